"""hf-sparse export: a table or one JSON object, and errors before any work."""

import json

import pytest

from hf_sparse.cli import main
from hf_sparse.export import TARGETS


def test_a_table_says_what_was_written(sparse_dir, tmp_path, capsys):
    assert (
        main(
            [
                "export",
                str(sparse_dir),
                "--to",
                "csr",
                "--output",
                str(tmp_path / "out"),
                "--option",
                "min-sparsity=0.5",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert "14 sparse tensors" in told and "of the dense tensors" in told and "torch multiplies CSR" in told


def test_json_is_the_only_output(sparse_dir, tmp_path, capsys):
    arguments = ["export", str(sparse_dir), "--to", "masks", "--output", str(tmp_path / "out"), "--json", "--no-verify"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["target"] == "masks" and result["verified"] == "no: switched off" and result["tensors"] == 14
    assert main(arguments) == 2 and "--overwrite" in json.loads(capsys.readouterr().out)["error"]
    assert main([*arguments, "--overwrite"]) == 0


def test_the_list(capsys):
    assert main(["export", "--list", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(TARGETS)
    assert main(["export", "--list"]) == 0
    told = capsys.readouterr().out
    assert all(target in told for target in TARGETS) and "Zeros today" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "maks"], "did you mean masks"),
        (["--to", "csr", "--option", "min_sparsity"], "NAME=VALUE"),
        (["--to", "csr", "--option", "min_sparsity=much"], "a number such as 0.0"),
        (["--to", "csr", "--option", "block=4x4"], "csr has no option 'block'"),
        (["--to", "csr", "--option", "verify=no"], "csr has no option 'verify'"),
        ([], "give --to TARGET; "),
    ],
)
def test_bad_arguments(sparse_dir, tmp_path, capsys, arguments, message):
    assert main(["export", str(sparse_dir), *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_missing_model(tmp_path, capsys):
    assert main(["export", str(tmp_path / "nowhere"), "--to", "masks", "--output", str(tmp_path / "out")]) == 2
    assert "no such directory" in capsys.readouterr().err
