"""DC-AR: masked autoregressive text-to-image generation over a deep compression tokenizer."""
