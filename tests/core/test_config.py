"""The configuration: what is refused, with which words, and which of command line, YAML and default wins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_cxr.core.config import Config, ConfigError, config_from_plain, load_config
from mlx_cxr.core.errors import UserError
from mlx_cxr.core.runs import RunNameError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
MINIMAL = "name: trial\ndata:\n  root: raw\n  work_dir: made\n"


@pytest.fixture
def written(tmp_path):
    """Write YAML text after the minimal configuration and return the file."""

    def write(text: str = "", base: str = MINIMAL) -> Path:
        path = tmp_path / "trial.yaml"
        path.write_text(base + text, encoding="utf-8")
        return path

    return write


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert isinstance(caught.value, UserError)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_in_the_repository_loads(path, monkeypatch):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\$\{(\w+)\}", text):
        monkeypatch.setenv(name, "/somewhere")
    config = load_config(path)
    assert config.name
    assert text.startswith("#"), "the header says the command, the time and what to expect"
    assert config_from_plain(json.loads(json.dumps(config.plain())), "config.json") == config


def test_defaults_fill_what_the_file_leaves_out(written):
    config = load_config(written())
    assert (config.name, config.seed, config.data.root) == ("trial", 0, Path("raw"))
    assert config.training.learning_rate == 3e-4
    assert config.data.views == ("AP", "PA")
    assert config.manifest_path == Path("made/manifest.csv")
    assert config.pixels_path == Path("made/images_224.npy")
    assert config.run_dir() == Path("outputs/cnn_baseline")
    assert config.run_dir("other") == Path("outputs/other")


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "-x", "a b", "x\n", "x" * 101])
def test_run_names_that_leave_the_outputs_folder_are_refused(written, name):
    with pytest.raises(RunNameError, match="run name"):
        load_config(written()).run_dir(name)
    assert "'run_name'" in fault(written(f"run_name: {json.dumps(name)}\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainning:\n  epochs: 3\n", ["unknown key 'trainning'", "did you mean 'training'?"]),
        ("training:\n  learning_rat: 0.1\n", ["unknown key 'training.learning_rat'", "'learning_rate'"]),
        ("pixels:\n  zzz: 1\n", ["unknown key 'pixels.zzz'", "known here: size, fit"]),
        ("training:\n  epochs: three\n", ["'training.epochs'", "integer", "'three'"]),
        ("training:\n  epochs: 3.0\n", ["'training.epochs'", "3.0"]),
        ("seed: true\n", ["'seed'", "True"]),
        ("training:\n  epochs: 0\n", ["'training.epochs'", "greater than or equal to 1", "0"]),
        ("training:\n  learning_rate: 0\n", ["'training.learning_rate'", "greater than 0"]),
        ("training:\n  learning_rate: .nan\n", ["'training.learning_rate'", "finite", "nan"]),
        ("training:\n  clip_norm: .inf\n", ["'training.clip_norm'", "finite", "inf"]),
        ("model:\n  dropout: 1.0\n", ["'model.dropout'", "less than 1"]),
        ("model:\n  output_stride: 8\n", ["'model.output_stride'", "16 or 32", "8"]),
        ("evaluation:\n  abstention_alpha: 0.0\n", ["'evaluation.abstention_alpha'", "greater than 0", "0.0"]),
        ("evaluation:\n  abstention_alpha: 1.0\n", ["'evaluation.abstention_alpha'", "less than 1", "1.0"]),
        ("explain:\n  labels: [Effusion]\n", ["'explain.labels.0'", "'Pleural Effusion'", "'Effusion'"]),
        ("labels:\n  uncertain_per_label: {Edemma: ones}\n", ["'labels.uncertain_per_label.Edemma'", "'Edema'"]),
        ("training: 3\n", ["'training'", "3"]),
        ("training:\n  epochs: 3\ntraining:\n  batch_size: 8\n", ["'training' stands twice", "line 7"]),
    ],
)
def test_faults_name_file_key_and_value(written, text, words):
    path = written(text)
    message = fault(path)
    assert str(path) in message
    for word in words:
        assert word in message


def test_every_fault_is_listed_at_once(written):
    message = fault(written("seed: -1\ntraining:\n  epochs: 0\n  bach_size: 4\n"))
    assert len(message.splitlines()) == 3
    for key in ("seed", "training.epochs", "training.bach_size"):
        assert f"'{key}'" in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("source: csv", "'data.csv' and 'source: csv' go together"),
        ("csv: {table: t.csv}", "'data.csv' and 'source: csv' go together"),
        ("{validation_fraction: 0.5, test_fraction: 0.5}", "leave no training patients"),
    ],
)
def test_impossible_combinations(written, data, words):
    entry = data.strip("{}") if data.startswith("{") else data
    lines = "".join(f"  {part.strip()}\n" for part in ([entry] if "table" in entry else entry.split(",")))
    message = fault(written(lines))
    assert words in message
    assert "'data'" in message


def test_missing_keys_are_named(written):
    path = written(base="name: x\ndata:\n  root: raw\n")
    assert fault(path) == f"{path}: key 'data.work_dir' is missing; see configs/demo.yaml, which has it"
    path = written(base=f"{MINIMAL}  source: csv\n  csv: {{}}\n")
    assert fault(path) == f"{path}: key 'data.csv.table' is missing; see configs/real_films.yaml, which has it"
    assert "see configs/demo.yaml" in fault(written(base="data: {root: raw, work_dir: w}\n"))


def test_files_that_are_no_configuration(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "near.yaml").write_text(MINIMAL)
    message = fault(tmp_path / "absent.yaml")
    assert "absent.yaml" in message
    assert "configs/near.yaml" in message
    assert "expected keys and values, found list" in fault(written(base="- a\n- b\n"))
    assert "expected keys and values, found NoneType" in fault(written(base=""))
    assert "not valid YAML" in fault(written("training: [1\n"))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: Röntgen\n".encode("latin-1"))
    assert "latin.yaml: not valid YAML" in fault(latin)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+1e-3", "0.001", "10e-4"])
def test_scientific_notation_is_a_number(written, text):
    assert load_config(written(f"training:\n  learning_rate: {text}\n")).training.learning_rate == 1e-3
    assert load_config(written(), [f"training.learning_rate={text}"]).training.learning_rate == 1e-3


def test_yaml_merge_keys_still_work(written):
    base = "name: x\ndata: &d {root: raw, work_dir: w}\n"
    assert load_config(written(base=base)).data.work_dir == Path("w")
    merged = base.replace("data: &d", "data:") + "pixels: {<<: {size: 64, workers: 2}, size: 96}\n"
    pixels = load_config(written(base=merged)).pixels
    assert (pixels.size, pixels.workers) == (96, 2)


def test_command_line_over_yaml_over_default(written):
    path = written("seed: 5\ntraining:\n  epochs: 7\n")
    assert load_config(path).training.epochs == 7
    assert load_config(path).training.batch_size == 32
    config = load_config(path, ["training.epochs=2", "training.batch_size=4"], seed=9, data__n_studies=None)
    assert (config.seed, config.training.epochs, config.training.batch_size) == (9, 2, 4)
    assert config.data.n_studies is None
    assert load_config(path, ["data.n_studies=3"], data__n_studies=500).data.n_studies == 500
    assert load_config(path, seed=0).seed == 0


def test_overrides_are_yaml_values(written):
    path = written()
    config = load_config(path, ["data.views=[PA, missing]", "data.reports=a=b.zip", "data.synthetic=true"])
    assert config.data.views == ("PA", "missing")
    assert config.data.reports == Path("a=b.zip")
    assert config.data.synthetic is True
    assert load_config(path, ["data.views=null"]).data.views is None
    assert load_config(written("training:\n"), ["training.epochs=3"]).training.epochs == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epochs", "write it as KEY=VALUE"),
        ("=3", "write it as KEY=VALUE"),
        ("seed.x=3", "'seed' is not a section"),
        ("training.epoch=3", "did you mean 'epochs'?"),
        ("seed=[", "--set 'seed=[': not valid YAML: line 1"),
        ("seed=&a [*a]", "--set 'seed=&a [*a]': line 1: lists and keys stand in each other"),
        (f"seed={'9' * 5000}", "…': line 1: a number of 5,000 digits"),
        ("seed=9999999999999999999", "'seed': Input should be less than"),
        (f"seed{'.x' * 5000}=1", "write it as KEY=VALUE"),
        ("seed=!!python/name:os.system", "the tag !!python/name:os.system is not used here"),
    ],
)
def test_faulty_overrides(written, override, words):
    assert words in fault(written("seed: 1\n"), override)


def test_environment_variables_are_replaced(written, monkeypatch):
    base = "name: x\ndata:\n  root: ${CXR_ROOT}/files\n  work_dir: ${CXR_WORK:-made}\n  views: ['${CXR_VIEW:-PA}']\n"
    monkeypatch.delenv("CXR_ROOT", raising=False)
    message = fault(written(base=base))
    for word in ("trial.yaml", "'data.root'", "CXR_ROOT", "--set data.root="):
        assert word in message
    monkeypatch.setenv("CXR_ROOT", "/disk")
    monkeypatch.setenv("CXR_VIEW", "LATERAL")
    config = load_config(written(base=base))
    assert config.data.root == Path("/disk/files")
    assert config.data.work_dir == Path("made")
    assert config.data.views == ("LATERAL",)
    monkeypatch.delenv("CXR_ROOT")
    assert load_config(written(base=base), ["data.root=here"]).data.root == Path("here")


def test_recorded_configuration_comes_back_equal(written):
    text = (
        "labels:\n  uncertain: soft\n  soft_value: 0.3\n  uncertain_per_label: {Edema: ones}\n"
        "explain:\n  labels: [Edema, Pneumothorax]\n"
    )
    base = MINIMAL + (
        "  source: csv\n  csv:\n    table: t.csv\n    findings: Labels\n    label_map: {Effusion: Pleural Effusion}\n"
        "    labels_covered: [Pleural Effusion]\n    where: {View: 'PA|AP'}\n"
    )
    config = load_config(written(text, base))
    recorded = json.loads(json.dumps(config.plain()))
    assert config_from_plain(recorded, "config.json") == config
    assert config.labels.policy().uncertain_per_label == {"Edema": "ones"}
    recorded["pixels"]["sise"] = 3
    with pytest.raises(ConfigError, match=r"outputs/x/config.json: unknown key 'pixels.sise'; did you mean 'size'"):
        config_from_plain(recorded, "outputs/x/config.json")


def test_configurations_cannot_be_changed(written):
    config: Config = load_config(written())
    with pytest.raises(Exception, match="frozen"):
        config.training.epochs = 3


def test_findings_are_known_in_any_case(written):
    config = load_config(
        written("explain: {labels: [edema, PNEUMOTHORAX]}\nlabels: {uncertain_per_label: {edema: ones}}\n")
    )
    assert config.explain.labels == ("Edema", "Pneumothorax")
    assert config.labels.uncertain_per_label == {"Edema": "ones"}
    assert "'explain.labels.0'" in fault(written("explain: {labels: [no finding]}\n"))


def test_a_run_is_given_by_its_name_or_its_folder(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("outputs/one", "elsewhere/two"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text("{}")
    config = load_config(written())
    assert config.run_dir("one") == config.run_dir("outputs/one") == Path("outputs/one")
    assert config.run_dir("elsewhere/two") == Path("elsewhere/two")
    with pytest.raises(RunNameError):
        config.run_dir("elsewhere/three")
    for given in ("one", "outputs/one", "outputs/one/", str(tmp_path / "outputs" / "one")):
        assert load_config(written(), teacher__run_name=given).teacher.run_name == "one"


def test_a_dicom_is_read_as_the_source_made_its_images_or_as_is_said(monkeypatch):
    monkeypatch.setenv("REALCXR", "anywhere")

    def recipe(name, *overrides):
        path = next(path for path in CONFIGS if path.stem == name)
        return load_config(path, ["data.root=somewhere", *overrides]).dicom_recipe

    assert [recipe(name) for name in ("demo", "mimic", "real_films")] == ["mimic", "mimic", "window"]
    assert recipe("mimic", "pixels.dicom_recipe=window") == "window"
    assert recipe("real_films", "pixels.dicom_recipe=mimic") == "mimic"
