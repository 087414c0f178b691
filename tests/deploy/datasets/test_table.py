"""Label tables: ISIC columns, HAM10000, a label column of one's own; and every bad row."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DataError, UserError
from deploy.datasets.files import SourceTable
from deploy.datasets.options import SourceOptions
from deploy.datasets.table import table_source

Draw = Callable[[Path], None]
LeafNames = Callable[[SourceTable], list[str]]

ISIC = """isic_id,diagnosis_1,diagnosis_2,patient_id
ISIC_1,benign,nevus,p1
ISIC_2,malignant,melanoma,p2
ISIC_3,benign,keratosis,p1
"""


@pytest.fixture
def folder(tmp_path: Path, draw: Draw) -> Path:
    for number in (1, 2, 3):
        draw(tmp_path / "images" / f"ISIC_{number}.jpg")
    (tmp_path / "labels.csv").write_text(ISIC)
    return tmp_path


def read(folder: Path, **options: object) -> SourceTable:
    given = {"images": folder / "images", "labels": folder / "labels.csv", **options}
    return table_source(SourceOptions("table", **given))  # type: ignore[arg-type]


def test_isic_columns_are_the_tree(folder: Path, leaf_names: LeafNames) -> None:
    table = read(folder)
    assert table.hierarchy.levels == ("diagnosis_1", "diagnosis_2")
    assert table.hierarchy.classes == (("benign", "malignant"), ("keratosis", "nevus", "melanoma"))
    assert leaf_names(table) == ["nevus", "melanoma", "keratosis"]
    assert table.columns["patient_id"] == ["p1", "p2", "p1"]
    assert table.group_column is None, "a patient column is used only when it is asked for"
    assert table.lines == [2, 3, 4]
    assert table.images.read(0).size == (12, 10)
    assert table.bad == ()


def test_row_order_does_not_change_the_tree(folder: Path) -> None:
    first = read(folder).hierarchy
    header, *rows = ISIC.splitlines()
    (folder / "labels.csv").write_text("\n".join([header, *reversed(rows)]))
    assert read(folder).hierarchy == first


def test_a_given_tree_sets_the_order_and_a_wrong_path_is_bad(folder: Path, leaf_names: LeafNames) -> None:
    (folder / "tree.csv").write_text("a,b\nmalignant,melanoma\nbenign,nevus\nmalignant,keratosis\n")
    table = read(folder, hierarchy=folder / "tree.csv")
    assert table.hierarchy.classes[1] == ("melanoma", "nevus", "keratosis")
    assert leaf_names(table) == ["nevus", "melanoma"]
    assert [str(row) for row in table.bad] == [
        "labels.csv, row 4: labels ['benign', 'keratosis'] are no path of the hierarchy; "
        "it has ['malignant', 'keratosis']"
    ]


def test_ham10000_has_its_tree_built_in(tmp_path: Path, draw: Draw, leaf_names: LeafNames) -> None:
    draw(tmp_path / "images/HAM10000_images_part_1/ISIC_0027419.jpg")
    draw(tmp_path / "images/HAM10000_images_part_2/ISIC_0031633.jpg")
    (tmp_path / "labels.csv").write_text(
        "lesion_id,image_id,dx,dx_type,age,sex,localization\n"
        "HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp\n"
        "HAM_0004234,ISIC_0031633,vasc,consensus,50.0,female,back\n"
    )
    table = read(tmp_path)
    assert leaf_names(table) == ["bkl", "vasc"]
    assert table.hierarchy.sizes == (2, 3, 7)
    assert table.group_column == "lesion_id"


def test_a_label_column_with_a_tree(folder: Path, leaf_names: LeafNames) -> None:
    (folder / "labels.csv").write_text("filename,cell\nISIC_1.jpg,x\nISIC_2.jpg,y\n")
    (folder / "tree.csv").write_text("group,cell\ng,x\ng,y\n")
    table = read(folder, hierarchy=folder / "tree.csv", label_column="cell")
    assert leaf_names(table) == ["x", "y"]
    with pytest.raises(UserError, match="--label-column needs --hierarchy"):
        read(folder, label_column="cell")
    with pytest.raises(UserError, match="no column 'dx'; its columns are: filename, cell"):
        read(folder, label_column="dx")
    with pytest.raises(UserError, match="name the column of leaf labels"):
        read(folder)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("ISIC_9,benign,nevus,p1", "row 5: 'ISIC_9': no such image"),
        ("../ISIC_1,benign,nevus,p1", "row 5: '../ISIC_1' leads out of the image folder"),
        ("/ISIC_1,benign,nevus,p1", "row 5: '/ISIC_1' leads out of the image folder"),
        (",benign,nevus,p1", "row 5: the image name is empty"),
        ("ISIC_1,benign,nevus,p1", "row 5: image 'ISIC_1' stands already in row 2"),
        ("ISIC_1,benign,nevus", "row 5: 3 cells where the header has 4"),
        ("ISIC_4,benign,,p1", "row 5: diagnosis_2 is empty"),
        ("ISIC_4,malignant,nevus,p1", "row 5: diagnosis_2 'nevus' has another parent than in row 2"),
    ],
)
def test_bad_rows_are_kept_apart(folder: Path, draw: Draw, row: str, reason: str) -> None:
    draw(folder / "images/ISIC_4.jpg")
    (folder / "labels.csv").write_text(ISIC + row + "\n")
    table = read(folder)
    assert len(table) == 3
    assert any(str(bad).startswith(f"labels.csv, {reason}") for bad in table.bad)


def test_a_name_that_two_folders_hold_is_ambiguous(folder: Path, draw: Draw) -> None:
    draw(folder / "images/more/ISIC_1.jpg")
    same = read(folder)
    assert (len(same), same.bad) == (3, ()), "the same bytes twice are one image"
    assert "1 image(s) lie in several folders with the same bytes" in same.notes[0]
    draw(folder / "images/more/other.jpg")
    (folder / "images/more/other.jpg").rename(folder / "images/more/ISIC_1.jpg")
    assert "several images of that name" in str(read(folder).bad[0])
    (folder / "labels.csv").write_text(ISIC.replace("ISIC_1", "more/ISIC_1.jpg"))
    assert read(folder).bad == ()


def test_tables_that_cannot_be_used(folder: Path) -> None:
    (folder / "labels.csv").write_text("photo,diagnosis_1\nx,y\n")
    with pytest.raises(UserError, match="has no image column"):
        read(folder)
    (folder / "labels.csv").write_bytes(b"image,diagnosis_1\nx,\xff\n")
    with pytest.raises(DataError, match="row 2: is not UTF-8"):
        read(folder)
    (folder / "labels.csv").write_text("image,diagnosis_1\nx,\n")
    with pytest.raises(DataError, match="holds no usable row"):
        read(folder)
    (folder / "labels.csv").write_text(ISIC)
    with pytest.raises(UserError, match="image folder is missing"):
        read(folder, images=folder / "pictures")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_tables_and_trees_of_other_separators(folder: Path, separator: str, leaf_names: LeafNames) -> None:
    (folder / "labels.csv").write_text("﻿" + ISIC.replace(",", separator), newline="\r\n")
    (folder / "tree.csv").write_text(
        f"a{separator}b\nmalignant{separator}melanoma\nbenign{separator}nevus\nbenign{separator}keratosis\n"
    )
    assert leaf_names(read(folder)) == ["nevus", "melanoma", "keratosis"]
    assert read(folder, hierarchy=folder / "tree.csv").hierarchy.classes[1][0] == "melanoma"


@pytest.mark.parametrize("column", ["Image", "image_name", "img_id", "ISIC_ID", "file_name"])
def test_image_columns_by_other_names(folder: Path, column: str) -> None:
    (folder / "labels.csv").write_text(ISIC.replace("isic_id", column))
    assert len(read(folder)) == 3


@pytest.mark.parametrize("name", ["images/ISIC_1.jpg", "images\\ISIC_1.jpg", "ISIC_1.jpg", ".\\ISIC_1"])
def test_paths_as_other_systems_and_folders_write_them(folder: Path, name: str) -> None:
    (folder / "labels.csv").write_text(ISIC.replace("ISIC_1", name))
    assert read(folder).bad == ()
    (folder / "images/part1").mkdir()
    (folder / "images/ISIC_1.jpg").rename(folder / "images/part1/ISIC_1.jpg")
    (folder / "labels.csv").write_text(ISIC.replace("ISIC_1", "part1\\ISIC_1.jpg"))
    assert read(folder).bad == ()


@pytest.mark.parametrize("name", ["C:\\ISIC_1", "..\\ISIC_1", "a\\..\\..\\ISIC_1"])
def test_paths_of_other_systems_that_lead_out(folder: Path, name: str) -> None:
    (folder / "labels.csv").write_text(ISIC.replace("ISIC_1", name))
    assert "leads out of the image folder" in str(read(folder).bad[0])


@pytest.mark.parametrize(
    ("written", "there", "hint"),
    [
        ("ISIC_1.png", "ISIC_1.jpg", "did you mean 'ISIC_1.jpg'?"),
        ("isic_1", "ISIC_1.jpg", "did you mean 'ISIC_1.jpg'?"),
        ("ISIC_1", "ISIC_1_downsampled.jpg", "did you mean 'ISIC_1_downsampled.jpg'?"),
        ("ISIC_9", "ISIC_1.jpg", "no such image"),
    ],
)
def test_a_near_file_name_is_said(folder: Path, written: str, there: str, hint: str) -> None:
    (folder / "images/ISIC_1.jpg").rename(folder / "images" / there)
    (folder / "labels.csv").write_text(ISIC.replace("ISIC_1", written))
    assert str(read(folder).bad[0]).endswith(hint)


@pytest.mark.parametrize("twin", ["Nevus", "NEVUS", "nev\u200bus", "\u200enevus", "\uff4eevus"])
def test_classes_that_differ_by_case_or_blanks_are_refused_or_joined(
    folder: Path, draw: Draw, leaf_names: LeafNames, twin: str
) -> None:
    draw(folder / "images/ISIC_4.jpg")
    draw(folder / "images/ISIC_5.jpg")
    (folder / "labels.csv").write_text(ISIC + f"ISIC_4,benign,{twin},p9\nISIC_5,benign,nevus,p9\n")
    refused = read(folder)
    assert refused.hierarchy.sizes == (2, 3)
    assert "diagnosis_2" in str(refused.bad[0])
    assert "is written 'nevus' elsewhere; did you mean it? (--fold-case)" in str(refused.bad[0])
    joined = read(folder, fold_case=True)
    assert joined.bad == ()
    assert leaf_names(joined).count("nevus") == 3
    assert "1 label(s) were joined" in joined.notes[0]
    (folder / "tree.csv").write_text("a,b\nmalignant,melanoma\nbenign,keratosis\nbenign,nevus\n")
    assert len(read(folder, hierarchy=folder / "tree.csv").bad) == 1
    assert len(read(folder, hierarchy=folder / "tree.csv", fold_case=True)) == 5
    (folder / "tree.csv").write_text(f'a,b\nmalignant,melanoma\nbenign,"{twin} x"\nbenign,nevus x\n')
    reason = "differ only by case, blanks or the form of a letter; did you mean|with a control character"
    with pytest.raises(DataError, match=reason):
        read(folder, hierarchy=folder / "tree.csv")


def test_an_unknown_label_names_the_near_leaf(folder: Path) -> None:
    (folder / "tree.csv").write_text("a,b\nmalignant,melanoma\nbenign,naevus\nbenign,keratosis\n")
    (folder / "labels.csv").write_text(ISIC.replace("diagnosis_1,", "x,").replace("diagnosis_2", "y"))
    table = read(folder, hierarchy=folder / "tree.csv", label_column="y")
    assert "unknown label 'nevus'; it is no leaf of the hierarchy; did you mean 'naevus'?" in str(
        table.bad[0]
    )


def test_the_first_levels_of_a_deep_export(folder: Path) -> None:
    (folder / "labels.csv").write_text(
        "isic_id,diagnosis_1,diagnosis_2,diagnosis_3\nISIC_1,benign,nevus,\nISIC_2,malignant,melanoma,\n"
        "ISIC_3,benign,nevus,blue\n"
    )
    assert "diagnosis_3 is empty; fill in every level, or take the levels above it with --levels 2" in str(
        read(folder).bad[0]
    )
    table = read(folder, depth=2)
    assert table.bad == ()
    assert table.hierarchy.levels == ("diagnosis_1", "diagnosis_2")
    for wrong in (0, 4):
        with pytest.raises(UserError, match=f"--levels {wrong}: .* has 3 diagnosis"):
            read(folder, depth=wrong)
