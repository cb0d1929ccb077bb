"""The `vllm-saga` command."""

from __future__ import annotations

from typer.testing import CliRunner

from vllm_saga import SagaConfig, __version__
from vllm_saga.cli import app

runner = CliRunner(env={"COLUMNS": "200"})


def test_version():
    assert runner.invoke(app, ["version"]).stdout.strip() == __version__


def test_config_shows_every_setting(tmp_path):
    path = tmp_path / "saga.yaml"
    path.write_text("headroom: 0.125\n")
    result = runner.invoke(app, ["config", str(path)])
    assert result.exit_code == 0
    assert "0.125" in result.stdout
    assert all(name in result.stdout for name in SagaConfig.model_fields)


def test_config_explains_a_bad_file(tmp_path):
    path = tmp_path / "saga.json"
    path.write_text('{"headroom": 7}')
    result = runner.invoke(app, ["config", str(path)])
    assert result.exit_code == 1
    assert "headroom = 7" in result.stderr
