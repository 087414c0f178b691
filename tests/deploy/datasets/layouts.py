"""Published data sets written small in their official layouts, images included."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

CUB = ("001.Black_footed_Albatross", "200.Common_Yellowthroat")
AIRCRAFT = ("Cessna 172", "707-320")
CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"]
LESIONS = ("nv", "mel", "bkl")


def draw_image(path: Path) -> None:
    """A small image of random pixels, different for every name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_cub(root: Path, train: int = 6, test: int = 2) -> Path:
    """CUB-200-2011 with two of its species in turn; the first ``train`` images are for training."""
    numbers = range(1, train + test + 1)
    names = [
        f"{CUB[0]}/Black_{number}.jpg" if number % 2 else f"200.Common_Y/Y_{number}.jpg" for number in numbers
    ]
    for name in names:
        draw_image(root / "images" / name)
    lines = {
        "classes.txt": [f"1 {CUB[0]}", f"200 {CUB[1]}"],
        "images.txt": [f"{number} {name}" for number, name in zip(numbers, names, strict=True)],
        "image_class_labels.txt": [f"{number} {1 if number % 2 else 200}" for number in numbers],
        "train_test_split.txt": [f"{number} {int(number <= train)}" for number in numbers],
    }
    for file, content in lines.items():
        (root / file).write_text("\n".join(content) + "\n")
    return root


def write_aircraft(root: Path, train: int = 8, test: int = 4, *, trainval: bool = True) -> Path:
    """FGVC-Aircraft with two variants in turn; its training lists as one or as two."""
    data = root / "data"
    for number in range(train + test):
        draw_image(data / "images" / f"{number:07d}.jpg")
    lines = [f"{number:07d} {AIRCRAFT[number % 2]}\n" for number in range(train + test)]
    half = train // 2
    splits = {"trainval": lines[:train]} if trainval else {"train": lines[:half], "val": lines[half:train]}
    for split, content in {**splits, "test": lines[train:]}.items():
        (data / f"images_variant_{split}.txt").write_text("".join(content))
    return root


def structs(fields: list[tuple[object, ...]], names: tuple[str, ...]) -> np.ndarray:
    """A MATLAB array of structs."""
    return np.array([fields], dtype=[(name, object) for name in names])


def write_cars(root: Path, train: int = 6, test: int = 3) -> Path:
    """Stanford Cars with its devkit, three models in turn."""
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    for split, number in (("train", train), ("test", test)):
        notes = [(1, 2, 3, 4, 1 + index % 3, f"{index + 1:05d}.jpg") for index in range(number)]
        for note in notes:
            draw_image(root / f"cars_{split}" / str(note[-1]))
        names = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
        file = "cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        savemat(root / "devkit" / file, {"annotations": structs(notes, names)})
    return root


def write_ham10000(root: Path, lesions: int = 24) -> Path:
    """HAM10000: two images of every lesion in two folders, and its metadata; three diagnoses in turn."""
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for lesion in range(lesions):
        for view in range(2):
            image = f"ISIC_{2 * lesion + view:07d}"
            draw_image(root / "images" / f"HAM10000_images_part_{view + 1}" / f"{image}.jpg")
            rows.append(f"HAM_{lesion:07d},{image},{LESIONS[lesion % 3]},histo,50,male,back")
    (root / "HAM10000_metadata").write_text("\n".join(rows) + "\n")
    return root
