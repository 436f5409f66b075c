"""CSV files of reports as people have them: what is read, what is refused with its cause, which rows go together."""

import pytest

from modules.data.report_tables import Table, read_rows, read_table
from modules.data.row_matching import match_rows
from modules.runtime.errors import InputError

REPORTS = ["Small effusion.", "Edema."]


@pytest.fixture
def read(tmp_path):
    """``read(content)`` writes bytes or text to a file and reads it."""

    def of(content, **options):
        path = tmp_path / "a.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_table(path, **options)

    return of


def texts(table):
    return [row[table.find("report")] for row in table.rows]


@pytest.mark.parametrize(
    "content",
    [
        "id,report\n1,Small effusion.\n2,Edema.\n",
        " ID , Report \n1,Small effusion.\n2,Edema.\n",
        "\ufeffid,report\r\n1,Small effusion.\r\n2,Edema.\r\n",
        "id,report\r1,Small effusion.\r2,Edema.\r",
        "id;report\n1;Small effusion.\n2;Edema.\n",
        "id\treport\n1\tSmall effusion.\n2\tEdema.\n",
        "sep=;\r\nid;report\r\n1;Small effusion.\r\n2;Edema.\r\n",
        "id|report\n1|Small effusion.\n2|Edema.\n",
        "1;Small effusion.\n2;Edema.\n",
        "1,Small effusion.\n2,Edema.\n",
        "\n\nid,report\n\n1,Small effusion.\n\n2,Edema.\n\n",
        "id,report\n1,Small effusion.\n2,Edema.\n".encode("utf-16"),
        "id,report\n1,Small effusion.\n2,Edema.\n".encode("utf-16-le"),
        "id,report\n1,Small effusion.\n2,Edema.\n".encode("utf-16-be"),
        ",report\n0,Small effusion.\n1,Edema.\n",
        "report\nSmall effusion.\nEdema.\n",
        "Small effusion.\nEdema.\n",
    ],
)
def test_every_spelling_of_two_reports(read, content):
    assert texts(read(content)) == REPORTS


def test_a_first_report_of_one_word_is_no_header(read):
    assert texts(read("normal\nEdema.\n")) == ["normal", "Edema."]
    assert texts(read("normal\n")) == ["normal"]


@pytest.mark.parametrize("content", ["case,gold\na,Edema.\nb,normal\n", "case;gold\na;Edema.\nb;normal\n"])
def test_unknown_names_of_two_columns_are_no_study(read, content):
    assert read(content).columns == ["case", "gold"]
    assert read("CXR7,normal\nCXR8,Edema.\n").columns == ["id", "report"]


def test_unknown_names_come_apart_at_another_separator(read):
    assert read("Datei;Patient;Befund\na;1;Erguss.\nb;2;Normal\n").columns == ["Datei", "Patient", "Befund"]


def test_blank_lines_of_one_column_are_empty_reports(read, capsys):
    for content in ("\nEdema .\n", "report\n\nEdema .\n", '""\nEdema .\n'):
        assert texts(read(content)) == ["", "Edema ."]
        assert "1 blank line(s) or empty cell(s) count as empty reports" in capsys.readouterr().err
    assert texts(read("Edema .\n\n")) == ["Edema .", ""]


def test_what_is_not_plain_is_said(read, capsys):
    assert texts(read("report\nFr\xe4ktur.\n".encode("cp1252"))) == ["Fr\xe4ktur."]
    assert "not UTF-8 text (byte 9); read as Windows-1252" in capsys.readouterr().err
    read("id;report\n1;Edema.\n")
    assert "columns are separated by ';'" in capsys.readouterr().err
    read("1,Edema.\n2,Effusion.\n")
    assert "taken for id and report" in capsys.readouterr().err
    read("id,report\n1,Edema.\n")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        (b"report\n\x81\n", r"not UTF-8 text \(byte 7\)"),
        ("id,report\n1,Eff\0usion.\n", "holds NUL bytes"),
        ('id,report\n1,"Effusion.\n2,Edema.\n', "in row 2 or after it: a quotation mark is never closed"),
        ('id,report\n1,"The \\"egg shell\\" sign."\n', "a quotation mark inside a quoted cell must be doubled"),
        (
            '{"id": "a", "report": "the \\"egg shell\\" sign"}\n',
            "is JSON, and a CSV file is read here; scripts/score.py",
        ),
        ("id,report,split\n1,Effusion.\n", "row 1 has 2 cells where the header has 3"),
        ("small effusion, edema.\nno edema.\n", "quotation marks around reports with commas"),
        ("a secret finding, and more.\nb, c.\n", "names no column such as 'report' or 'id'"),
        ("id,report\n1," + "x" * 140_000, "field larger than field limit"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line_without_a_report(read, content, cause):
    with pytest.raises(InputError, match=cause) as caught:
        read(content)
    message = str(caught.value)
    assert "\n" not in message and not {"secret", "egg", "effusion", "Effusion."} & set(message.split())


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_table(tmp_path)


def test_captions_are_rows_of_any_length(tmp_path):
    (tmp_path / "a.csv").write_text('a dog,"two, dogs"\na cat\n')
    assert read_rows(tmp_path / "a.csv") == [["a dog", "two, dogs"], ["a cat"]]


# ---- which rows belong together


@pytest.mark.parametrize(
    "name", ["id", "ID", " Study_ID ", "dicom_id", "IMAGE_PATH", "image_id", "uid", "case", "accession", ""]
)
def test_rows_are_matched_by_any_column_of_ids(name):
    references = Table("gts.csv", [name, "report"], [["a", "1"], ["b", "2"]])
    hypotheses = Table("res.csv", ["report", name.upper()], [["two", "b"], ["one", "a"]])
    assert [row[0] for row in match_rows(references, hypotheses).rows] == ["one", "two"]


def test_rows_are_matched_by_the_column_that_tells_them_apart():
    names = ["study_id", "dicom_id", "report"]
    references = Table("gts.csv", names, [["s", "a", "1"], ["s", "b", "2"]])
    hypotheses = Table("res.csv", names, [["s", "b", "two"], ["s", "a", "one"]])
    assert [row[2] for row in match_rows(references, hypotheses).rows] == ["one", "two"]
    windows = Table("res.csv", ["image_path", "report"], [["p\\2.png", "two"], ["p\\1.png", "one"]])
    unix = Table("gts.csv", ["image_path", "report"], [["p/1.png", "1"], ["p/2.png", "2"]])
    assert [row[1] for row in match_rows(unix, windows).rows] == ["one", "two"]


@pytest.mark.parametrize(
    ("left", "right", "cause"),
    [
        (
            (["id", "report"], [["a", "x"]]),
            (["study_id", "report"], [["b", "x"]]),
            "res.csv: no row with id a .*'study_id' of res.csv",
        ),
        ((["id", "report"], [["1", "x"], ["2", "y"]]), (["ID", "report"], [["1", "x"]]), "res.csv: no row with id 2"),
        ((["id", "report"], [["001", "x"]]), (["id", "report"], [["1.0", "x"]]), "same numbers, written otherwise"),
        ((["id", "report"], [["a", "x"], ["a", "y"]]), (["id", "report"], [["a", "x"]]), "id a is in 2 rows"),
        ((["report"], [["x"], ["y"]]), (["report"], [["x"]]), "gts.csv has 2 rows and res.csv 1"),
        ((["report"], []), (["report"], [["x"]]), "gts.csv: no rows below the header"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(left, right, cause):
    with pytest.raises(InputError, match=cause):
        match_rows(Table("gts.csv", *left), Table("res.csv", *right))


def test_ids_that_tell_no_rows_apart_must_at_least_be_the_same():
    names = ["subject_id", "report"]
    references = Table("gts.csv", names, [["p", "1"], ["p", "2"], ["q", "3"]])
    assert match_rows(references, references) == references
    with pytest.raises(InputError, match="id p is in 2 rows"):
        match_rows(references, Table("res.csv", names, references.rows[::-1]))


@pytest.mark.parametrize(
    ("names", "left", "right", "cause"),
    [
        (
            ["image_id", "study_id"],
            ["1A", "2B"],
            ["2A", "1B"],
            "row 2 goes with row 1 of gts.csv .* study_id is B, not A",
        ),
        (["", "study_id"], ["0A", "1A", "2B"], ["0B", "1A", "2A"], "study_id is B, not A"),  # pandas' row numbers
        (["study_id", "subject_id"], ["Ap", "Ap"], ["Ap", "Aq"], "subject_id is q, not p"),
    ],
)
def test_paired_rows_must_not_contradict_each_other(names, left, right, cause):
    with pytest.raises(InputError, match=cause):
        match_rows(Table("gts.csv", names, list(map(list, left))), Table("res.csv", names, list(map(list, right))))


def test_other_spellings_missing_ids_and_columns_of_a_file_are_no_contradiction():
    names = ["id", "image_path", "study_id", "run_id"]
    references = Table("gts.csv", names, [["a", "x/1.png", "01", "r"], ["b", "x/2.png", "", "r"]])
    hypotheses = Table("res.csv", names, [["a", "y/1.png", "1.0", "s"], ["b", "2.png", "7", "s"]])
    assert match_rows(references, hypotheses) == hypotheses


def test_row_numbers_do_not_win_over_a_column_with_a_name():
    references = Table("gts.csv", ["index", "image", "report"], [["0", "A", "1"], ["1", "B", "2"]])
    hypotheses = Table("res.csv", ["index", "image", "report"], [["0", "B", "two"], ["1", "A", "one"]])
    assert [row[2] for row in match_rows(references, hypotheses).rows] == ["one", "two"]


def test_row_by_row_only_where_a_file_has_no_ids(capsys):
    with_ids = Table("gts.csv", ["id", "report"], [["a", "x"]])
    assert match_rows(with_ids, Table("res.csv", ["report"], [["y"]])).rows == [["y"]]
    numbered = Table("res.csv", ["", "report"], [["7", "y"]])
    assert match_rows(with_ids, numbered).rows == numbered.rows
    assert capsys.readouterr().err.count("only gts.csv has a column of ids: the two files are compared row by row") == 2


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["", "study_id"], ["", "image_id"]),  # the row numbers that pandas writes are no ids
        (["index", "study"], ["index", "id"]),
        (["study_id", "run_id"], ["id", "run_id"]),  # told apart by no run_id, which is the same everywhere
        (["study_id", "patient_id"], ["id", "patient_id"]),
        (["Image Index", "age"], ["Image Index", "age"]),
        (["Accession Number", "covid"], ["Accession Number", "covid"]),
        (["exam", "covid"], ["exam", "covid"]),
    ],
)
def test_ids_are_known_by_any_name_and_by_their_values(names, others):
    places = [names.index(name) for name in names if name not in ("", "index", "run_id", "patient_id", "age", "covid")]
    rows = [[f"s{n}" if place in places else "r" for place in range(2)] for n in range(5)]
    left = [[*row, f"{n}"] for n, row in enumerate(rows)]
    right = [left[n] for n in (2, 0, 4, 1, 3)]
    if names[0] in ("", "index"):
        left, right = ([[str(n), *row[1:]] for n, row in enumerate(side)] for side in (left, right))
    if names[1] in ("patient_id", "covid", "age"):
        left, right = ([[row[0], str(int(row[2]) // 2), row[2]] for row in side] for side in (left, right))
    found = match_rows(Table("gts.csv", [*names, "report"], left), Table("res.csv", [*others, "report"], right))
    assert [row[2] for row in found.rows] == list("01234")


def test_a_column_of_unknown_name_is_ids_where_both_files_have_its_values(capsys):
    left, right = ([[f"k{n}", str(n)] for n in order] for order in ((0, 1, 2, 3), (3, 1, 0, 2)))
    found = match_rows(Table("gts.csv", ["Befund", "report"], left), Table("res.csv", ["Fall", "report"], right))
    assert found.rows == left
    assert "joined by 'befund' of the one and 'fall' of the other" in capsys.readouterr().err
    # Two rows of labels have the same values by chance: a wrong label is no other study.
    truth, claim = (Table(f"{name}.csv", ["label", "report"], [[a, "x"], [b, "y"]]) for name, a, b in ("g01", "r10"))
    assert match_rows(truth, claim) == claim


def test_every_column_of_ids_that_both_have_must_agree_with_the_others():
    names = ["id", "accession", "report"]  # an id that only counts rows
    references = Table("gts.csv", names, [["0", "A", "1"], ["1", "B", "2"]])
    hypotheses = Table("res.csv", names, [["0", "B", "two"], ["1", "A", "one"]])
    with pytest.raises(InputError, match="its accession is B, not A"):
        match_rows(references, hypotheses)
    # Ranks are of the file: nothing is known of them but that they count rows.
    ranked = Table("gts.csv", ["id", "rank"], [["a", "1"], ["b", "2"], ["c", "3"], ["d", "4"]])
    assert match_rows(ranked, Table("res.csv", ["id", "rank"], [list(row) for row in ("a2", "b1", "c4", "d3")])).rows


def test_row_numbers_of_one_file_are_no_ids_of_the_other(capsys):
    references = Table("gts.csv", ["id", "report"], [["1", "b"], ["0", "a"]])
    hypotheses = Table("res.csv", ["", "report"], [["0", "b"], ["1", "a"]])
    assert match_rows(references, hypotheses) == hypotheses
    bare = Table("res.csv", ["report"], [["x"]])
    match_rows(bare, bare)
    assert "neither res.csv nor res.csv has a column of ids: the two files are compared" in capsys.readouterr().err
