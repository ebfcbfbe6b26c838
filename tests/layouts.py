"""Small but true copies of data sets as they are downloaded: names, nesting, odd members.

Each function writes one layout into a folder and returns the folder as text.
"""

import io
import json
import tarfile
import uuid
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image
from scipy.io import savemat

WNIDS = ("n01440764", "n02105855", "n02447366", "n03995372")  # sorted: labels 0 to 3
# ImageNet's one PNG, and one of its 22 pictures in CMYK; both are named as if they were neither.
PNG, CMYK = "n02105855_2933", "n02447366_23489"
PICTURES_PER_CLASS, VAL_PICTURES = 6, 8
TRAIN_NAMES = {
    wnid: [
        *[name for name in (PNG, CMYK) if name.startswith(wnid)],
        *[f"{wnid}_{10026 + 7 * number}" for number in range(PICTURES_PER_CLASS)],
    ][:PICTURES_PER_CLASS]
    for wnid in WNIDS
}
VAL_WNIDS = {f"ILSVRC2012_val_{n + 1:08d}": WNIDS[(3 * n + 1) % 4] for n in range(VAL_PICTURES)}
# ILSVRC's own ids follow no order of the wnids.
ILSVRC_IDS = {"n02447366": 1, "n01440764": 2, "n03995372": 3, "n02105855": 4}

TRAIN_PROMPTS = [
    "A red fox in the snow, oil painting --ar 16:9 --v 5",
    "two lighthouses at dusk",
    "a bowl of ramen, studio light --q 2",
    "Portrait of an old sailor",
    "isometric tiny kitchen --no people, text",
    "<https://s.mj.run/abc> a castle made of glass --v 4",
    "a whale above a city",
]
# The last two are train's words with other parameters, case and links.
VAL_PROMPTS = [
    "a quiet harbour --ar 2:3",
    "ISOMETRIC tiny kitchen --v 5",
    "A castle made of glass --ar 1:1",
]
MJHQ_CATEGORIES = ("animals", "art", "vehicles")


def picture(
    name: str, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (48, 40)
) -> bytes:
    """A file of coloured stripes of its own, drawn from the name."""
    rng = np.random.default_rng(list(name.encode()))
    coarse = rng.integers(0, 256, (5, 6, len(mode)), dtype=np.uint8)
    image = Image.frombytes(mode, (6, 5), coarse.tobytes()).resize(size)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def imagenet_picture(name: str) -> bytes:
    if name == PNG:
        return picture(name, kind="PNG")
    return picture(name, mode="CMYK" if name == CMYK else "RGB")


def tar_bytes(files: Iterable[tuple[str, bytes | None]], mode: str = "w") -> bytes:
    """A tar of files, and of folders where there are no bytes. mode: "w:gz" for a .tgz."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return file.getvalue()


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def imagenet_tars(folder: Path) -> str:
    """ILSVRC's train tar of class tars and flat val tar; no classes for val."""
    classes = [
        (f"{w}.tar", tar_bytes((f"{n}.JPEG", imagenet_picture(n)) for n in TRAIN_NAMES[w]))
        for w in reversed(WNIDS)
    ]
    write(folder / "ILSVRC2012_img_train.tar", tar_bytes(classes))
    val = [(f"{name}.JPEG", imagenet_picture(name)) for name in reversed(VAL_WNIDS)]
    write(folder / "ILSVRC2012_img_val.tar", tar_bytes(val))
    return str(folder)


def kaggle_val_labels(folder: Path) -> str:
    """LOC_val_solution.csv, whose rows are in no order."""
    rows = [f"{name},{wnid} 111 28 255 141 " for name, wnid in reversed(VAL_WNIDS.items())]
    write(folder / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return str(folder / "LOC_val_solution.csv")


def imagenet_devkit(folder: Path) -> str:
    """ILSVRC2012_devkit_t12.tar.gz: the val pictures' ILSVRC ids, and meta.mat that explains them.

    meta.mat lists groups of classes, too, under further ids.
    """
    rows = [(number, wnid, "words", 0) for wnid, number in ILSVRC_IDS.items()]
    rows.append((len(rows) + 1, "n00001740", "entity", 2))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    truth = "".join(f"{ILSVRC_IDS[wnid]}\n" for _, wnid in sorted(VAL_WNIDS.items()))
    top = "ILSVRC2012_devkit_t12"
    files = [
        (f"{top}/", None),
        (f"{top}/readme.txt", b"read me"),
        (f"{top}/data/meta.mat", meta.getvalue()),
        (f"{top}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
    ]
    write(folder / f"{top}.tar.gz", tar_bytes(files, "w:gz"))
    return str(folder / f"{top}.tar.gz")


def imagenet_folders(folder: Path) -> str:
    """train/<wnid>/*.JPEG and val/<wnid>/*.JPEG."""
    for wnid, names in TRAIN_NAMES.items():
        for name in names:
            write(folder / f"train/{wnid}/{name}.JPEG", imagenet_picture(name))
    for name, wnid in VAL_WNIDS.items():
        write(folder / f"val/{wnid}/{name}.JPEG", imagenet_picture(name))
    return str(folder)


def imagenet_kaggle(folder: Path) -> str:
    """Kaggle's: the same below ILSVRC/Data/CLS-LOC, val flat, its classes in a csv."""
    inner = folder / "ILSVRC/Data/CLS-LOC"
    imagenet_folders(inner)
    for path in sorted((inner / "val").glob("*/*.JPEG")):
        path.rename(inner / "val" / path.name)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    kaggle_val_labels(folder)
    return str(folder)


def imagenet_parquet(folder: Path, rows_per_group: int = 4) -> str:
    """The hub's: data/train-*-of-*.parquet, shuffled, and validation; test has labels of -1."""
    train = [(name, wnid) for wnid, names in TRAIN_NAMES.items() for name in names]
    order = np.random.default_rng(0).permutation(len(train))
    train = [train[place] for place in order]
    pieces = {
        "train-00000-of-00002": train[:13],
        "train-00001-of-00002": train[13:],
        "validation-00000-of-00001": list(VAL_WNIDS.items()),
        "test-00000-of-00001": [("ILSVRC2012_test_00000001", None)],
    }
    for name, rows in pieces.items():
        images = [
            {
                "bytes": imagenet_picture(stem),
                "path": f"{stem}_{wnid}.JPEG" if wnid else f"{stem}.JPEG",
            }
            for stem, wnid in rows
        ]
        labels = [WNIDS.index(wnid) if wnid else -1 for _, wnid in rows]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        path = folder / f"data/{name}.parquet"
        pq.write_table(
            pa.table({"image": images, "label": labels}), path, row_group_size=rows_per_group
        )
    return str(folder)


def journey_name(split: str, archive: str, number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{split}/{archive}/{number}"))


def journey_line(path: str, prompt: str, **tasks: Any) -> str:
    entry = {
        "img_path": path,
        "prompt": prompt,
        "Task1": {"style": []},
        "Task3": {"Style": []},
        **tasks,
    }
    return json.dumps(entry) + "\n"


def _journey_tasks(number: int) -> dict[str, Any]:
    """Task2 as it is for most pictures, missing, null, and with null or empty captions."""
    odd: dict[int, dict[str, Any]] = {
        1: {},
        2: {"Task2": None},
        3: {"Task2": {"Caption": None}},
        6: {"Task2": {"Caption": " "}},
    }
    return odd.get(number, {"Task2": {"Caption": f"The {number}th picture, described."}})


def _journey_split(folder: Path, split: str, prompts: list[str], annotations: str) -> None:
    lines = []
    for archive in ("000", "001"):
        members: list[tuple[str, bytes | None]] = [(f"{archive}/", None)]
        for number, prompt in enumerate(prompts):
            name = journey_name(split, archive, number)
            members.append((f"{archive}/{name}.jpg", picture(name)))
            lines.append(journey_line(f"./{archive}/{name}.jpg", prompt, **_journey_tasks(number)))
        members.append((f"{archive}/{journey_name(split, archive, 99)}.jpg", picture(archive)))
        write(folder / f"data/{split}/imgs/{archive}.tgz", tar_bytes(members, "w:gz"))
    lines.append(journey_line("./199/elsewhere.jpg", "a picture that was not downloaded"))
    text = "".join(reversed(lines)).encode()
    data = tar_bytes([(annotations, text)], "w:gz")
    write(folder / f"data/{split}/{annotations}.tgz", data)


def journeydb(folder: Path, *, valid: bool = True) -> str:
    """Two archives of 8 pictures a split; the last of each has no annotation."""
    _journey_split(folder, "train", TRAIN_PROMPTS, "train_anno_realease_repath.jsonl")
    if valid:
        _journey_split(folder, "valid", VAL_PROMPTS, "valid_anno_repath.jsonl")
    return str(folder)


def mjhq_id(category: str, number: int) -> str:
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{category}/{number}").hex


def mjhq(folder: Path) -> str:
    """mjhq30k_imgs.zip and meta_data.json: three categories of four pictures, in no order."""
    places = [(category, mjhq_id(category, n)) for n in range(4) for category in MJHQ_CATEGORIES]
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "mjhq30k_imgs.zip", "w") as archive:
        for category in MJHQ_CATEGORIES:
            archive.writestr(f"{category}/", b"")
        for category, name in places:
            archive.writestr(f"{category}/{name}.jpg", picture(name))
        archive.writestr(f"__MACOSX/animals/._{places[0][1]}.jpg", b"not a picture")
    meta = {
        name: {"category": category, "prompt": f"a {category} picture {name[:4]}", "index": n}
        for n, (category, name) in enumerate(places)
    }
    write(folder / "meta_data.json", json.dumps(meta))
    return str(folder)


def write_wds(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """By webdataset's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(dict(sample))


def timm_shards(folder: Path) -> str:
    """timm/imagenet-1k-wds: jpg, cls, json; the validation shards have shorter numbers."""
    names = {
        "imagenet1k-train-0000": [(n, w) for w in WNIDS[:2] for n in TRAIN_NAMES[w]],
        "imagenet1k-train-0001": [(n, w) for w in WNIDS[2:] for n in TRAIN_NAMES[w]],
        "imagenet1k-validation-00": list(VAL_WNIDS.items()),
    }
    for shard, pictures in names.items():
        samples = [
            {
                "__key__": name,
                "jpg": imagenet_picture(name),
                "cls": WNIDS.index(wnid),
                "json": {"filename": f"{name}.JPEG", "label": WNIDS.index(wnid), "class": wnid},
            }
            for name, wnid in pictures
        ]
        write_wds(folder / f"{shard}.tar", samples)
    write(folder / "_info.json", "{}")
    return str(folder)


def tokenizer_1d_shards(folder: Path) -> str:
    """As 1d-tokenizer converts ImageNet: jpg and cls, keys that count the pictures."""
    for split, pictures in {"train": TRAIN_NAMES[WNIDS[0]], "val": list(VAL_WNIDS)[:4]}.items():
        for shard in range(2):
            samples = [
                {"__key__": f"{place:08d}", "jpg": imagenet_picture(name), "cls": place % 4}
                for place, name in enumerate(pictures[shard::2])
            ]
            write_wds(folder / f"imagenet-{split}-{shard:06d}.tar", samples)
    return str(folder)


def img2dataset_shards(folder: Path) -> str:
    """jpg, txt, json with the address; beside each tar its table and counts."""
    for shard in range(2):
        samples, rows = [], []
        for number in range(5):
            key = f"{shard:05d}{number:04d}"
            failed = number == 3
            entry = {
                "caption": f"caption number {key}",
                "url": f"https://example.com/{key}.jpg",
                "key": key,
                "status": "failed_to_download" if failed else "success",
                "error_message": "HTTP Error 404" if failed else None,
                "width": None if failed else 48,
                "height": None if failed else 40,
                "original_width": None if failed else 48,
                "original_height": None if failed else 40,
                "exif": None if failed else "{}",
                "sha256": None if failed else "0" * 64,
            }
            rows.append(entry)
            if not failed:
                sample = {"__key__": key, "jpg": picture(key), "txt": entry["caption"]}
                samples.append({**sample, "json": entry})
        write_wds(folder / f"{shard:05d}.tar", samples)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        write(folder / f"{shard:05d}_stats.json", json.dumps({"count": 5, "successes": 4}))
    return str(folder)


def hand_made_shards(folder: Path) -> str:
    """`tar cf` of a folder: `./` before each name, suffixes in capitals, files of other kinds."""
    members: list[tuple[str, bytes | None]] = [("./", None)]
    for number, suffix in enumerate(["JPG", "jpeg", "PNG", "Jpeg"]):
        kind = "PNG" if suffix == "PNG" else "JPEG"
        members.append((f"./{number:03d}.{suffix}", picture(str(number), kind=kind)))
        members.append((f"./{number:03d}.pyd", b"never opened"))
        members.append((f"./{number:03d}.TXT", f"words {number}".encode()))
    write(folder / "pictures-test-0.tar", tar_bytes(members))
    return str(folder)
