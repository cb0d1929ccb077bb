"""scripts/make-model and scripts/make-vllm-metadata, run as a user runs them."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script, *args):
    command = [sys.executable, str(SCRIPTS / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_token_id_of_the_model_decodes(tmp_path):
    from tokenizers import Tokenizer

    assert run("make-model", tmp_path, "--vocab", 600).returncode == 0
    config = json.loads((tmp_path / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert config["vocab_size"] == tokenizer.get_vocab_size() == 600
    assert all(tokenizer.id_to_token(i) is not None for i in range(600))
    text = "def f(x): return 'é'\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--vocab", 100], "one token per byte"),
        (["--heads", 7], "multiple of --heads"),
        (["--kv-heads", 3], "multiple of --kv-heads"),
        (["--layers", 0], "--layers must be at least 1"),
    ],
)
def test_a_model_that_cannot_be_is_refused(tmp_path, args, message):
    done = run("make-model", tmp_path / "model", *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "model").exists()


def test_the_metadata_wheel_requires_and_contains_nothing(tmp_path):
    assert run("make-vllm-metadata", tmp_path, "0.32.0+cpu").returncode == 0
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read("vllm-0.32.0+cpu.dist-info/METADATA").decode()
    assert all(name.startswith("vllm-0.32.0+cpu.dist-info/") for name in names)
    assert "Requires-Dist" not in metadata
