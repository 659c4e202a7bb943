"""The sections of an experiment's configuration: keys, types, ranges, defaults and what they mean.

A section is frozen and strict: an unknown key or a wrong type is an error, never a guess.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mlx_cxr.core.labels import LABELS, MAPPED, Empty, LabelPolicy, Uncertain

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Sections = tuple[Literal["indication", "findings", "impression", "last_paragraph", "whole"], ...]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
_NAMES = {label.casefold(): label for label in LABELS}
_AnyCase = BeforeValidator(lambda name: _NAMES.get(str(name).casefold(), name))
Label = Annotated[Literal[LABELS], _AnyCase]  # type: ignore[valid-type]


class Section(BaseModel):
    """A section of the configuration: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DemoConfig(Section):
    """The built-in synthetic cohort (`make_demo_data`)."""

    patients: Count = 600
    image_size: Annotated[int, Field(ge=128, le=4096)] = 512
    """Short side of a rendered image in pixels."""
    laterals: bool = True
    """False draws a download of frontal images: laterals, which a classifier of frontal ones drops, are in no table.
    Everything else is the same."""


class CsvSource(Section):
    """Reading of any table of images or of reports: column names, label mapping, separator; for `data.source: csv`."""

    table: Path
    """`.csv`, `.csv.gz`, or `.jsonl`, an object per line, whose keys are the columns."""
    separator: Annotated[str, Field(min_length=1)] = ","
    patient: str = "patient_id"
    """May be the column of `study`, where the table does not distinguish patients from studies."""
    study: str | None = "study_id"
    """None takes each image as a study of its own."""
    image: str | None = "image_file"
    """Column with the image's path relative to `data.root`; also the image's id. None: reports without images."""
    view: str | None = None
    age: str | None = None
    sex: str | None = None
    text: str | None = None
    """Column with the report, or a note."""
    sections: dict[Literal["indication", "findings", "impression"], str] = {}
    """Columns with the report's sections, in place of `text`."""
    split: str | None = None
    """Column with train / validate / test; None makes a patient-grouped split."""
    where: dict[str, str] = {}
    """Keep only rows whose column matches this regular expression (from its beginning)."""
    findings: str | None = None
    """Column with a list of findings; None means one 1 / 0 / -1 / empty column per label. A row where it is empty is
    not labelled: its report, if it has one, is kept for a student to learn from. The empty list of a `.jsonl`, or a
    separator alone, says that nothing was found."""
    findings_separator: Annotated[str, Field(min_length=1)] = "|"
    label_map: dict[str, Label] = {}
    """Source name, in whatever case -> one of the 14; names mapped to nothing are counted and ignored."""
    ignore: tuple[str, ...] = ()
    """Columns that are not read although they look like a finding's."""
    blank_rows: Literal["not labelled", "absent"] | None = None
    """Meaning of a row without a value in any column of a label: nobody labelled it, or all of them are absent. None
    takes the first where there is a column for No Finding, and asks where there is none."""
    labels_covered: tuple[Label, ...] | None = None
    """Labels the source annotates: absent from the list means 0. The others stay empty. None: those mapped to."""

    @property
    def text_only(self) -> bool:
        """True for reports without images."""
        return self.image is None

    @model_validator(mode="after")
    def _columns_go_together(self) -> CsvSource:
        if self.text is not None and self.sections:
            raise ValueError("'text' is a column of whole reports, 'sections' are columns of their parts: give one")
        if self.text_only and self.study is None:
            raise ValueError("'image: null' means reports without films: then 'study' has to name the report's id")
        if self.text_only and self.text is None and not self.sections:
            raise ValueError("'image: null' means reports without films: name their column in 'text' or 'sections'")
        return self


class BoxesConfig(Section):
    """Boxes that readers drew around findings, by which maps are scored (`data.places`)."""

    table: Path
    """CSV in the form of NIH's `BBox_List_2017.csv` or of VinDr-CXR's annotations."""
    frame: tuple[Count, Count] | None = None
    """Width and height of the images that the boxes were drawn on, such as [1024, 1024] for NIH's; None: those of the
    image files. The images may have been made smaller since, not cut."""
    label_map: dict[str, Label] = {}
    """Name in the table, in whatever case -> one of the 14, beside the names that `data.places` knows."""


class MasksConfig(Section):
    """Masks that readers drew of findings, by which maps are scored (`data.places`)."""

    table: Path
    """CSV with `image_file`, `cls` and `mask_file`, or JSON as CheXlocalize's."""
    root: Path | None = None
    """Folder that `mask_file` is relative to; None: that of the table."""
    label_map: dict[str, Label] = {}
    """As in `boxes`."""


class DataConfig(Section):
    """Location of the raw data, and selection of the part that becomes the manifest."""

    source: Literal["mimic-cxr-jpg", "csv"] = "mimic-cxr-jpg"
    synthetic: bool = False
    """True for the built-in cohort: every result and picture then says so."""
    root: Path
    work_dir: Path
    """Folder for `manifest.csv`, `splits.json` and the pixel store."""
    reports: Path | None = None
    """Folder or zip of MIMIC-CXR reports; None looks for them beside the images and does without."""
    report_sections: Sections = ("impression", "findings", "last_paragraph")
    """Sections in the manifest's text; `reports.csv` has every section."""
    report_mode: Literal["first", "all"] = "first"
    """`first`: the first of `report_sections` that a report has (a fall-back order). `all`: all of them, in order."""
    labeler: Literal["chexpert", "negbio"] = "chexpert"
    views: tuple[str, ...] | None = ("AP", "PA")
    """View positions kept; None keeps all. `missing` stands for images without one."""
    n_studies: Count | None = None
    patients_table: Path | None = None
    """Optional table with `subject_id`, `gender` and `anchor_age` (MIMIC-IV `patients.csv.gz`)."""
    split: Literal["source", "made"] = "source"
    """`source`: the split the data come with, where they do. `made`: one by patient in its place, as for a download so
    partial that the official validation patients are not in it; figures are then not comparable with published ones."""
    validation_fraction: Fraction = 0.15
    test_fraction: Fraction = 0.2
    """Shares of patients in a split that is made here, and least shares of a sample of `n_studies`: MIMIC-CXR's
    official validation and test splits are so small that a proportional sample would leave too few to score."""
    csv: CsvSource | None = None
    boxes: BoxesConfig | None = None
    masks: MasksConfig | None = None

    @model_validator(mode="after")
    def _one_truth(self) -> DataConfig:
        if self.boxes is not None and self.masks is not None:
            raise ValueError("'boxes' and 'masks' are two truths about the same maps: give one")
        return self

    @model_validator(mode="after")
    def _csv_goes_with_csv(self) -> DataConfig:
        if (self.source == "csv") != (self.csv is not None):
            raise ValueError(
                "'data.csv' and 'source: csv' go together: give both, as configs/real_films.yaml, or neither"
            )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction leave no training patients; make them smaller")
        return self


class PixelsConfig(Section):
    """The pixel store, and the same transform at inference."""

    size: Annotated[int, Field(ge=32, le=2048)] = 224
    fit: Literal["letterbox", "center_crop"] = "letterbox"
    dicom_recipe: Literal["mimic", "window"] | None = None
    """How a DICOM becomes gray levels, in training and at inference (see `data.dicom`): `mimic`, as MIMIC-CXR-JPG made
    its images; `window`, as a viewer shows it and most programs export it. None takes `mimic` for that source, and
    `window` for any other."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Decoding processes; 0 takes one per core."""
    shard_films: Count = 65_536
    """Images of one file of the store at most, 3.3 GB at 224 px; a store of more lies in several."""


class LabelsConfig(Section):
    """The label policy for training; see `labels.LabelPolicy`."""

    uncertain: Uncertain = "zeros"
    empty: Empty = "negative"
    soft_value: Fraction = 0.5
    uncertain_per_label: dict[Label, Uncertain] = {}
    budget: Annotated[float, Field(gt=0.0, lt=1.0)] | Annotated[int, Field(ge=1)] | None = None
    """Training patients whose labels may be used, as a share or a number; None uses all. The images and reports of the
    others stay: a student learns from them by what its teacher reads. Validation and test keep all their labels."""

    def policy(self) -> LabelPolicy:
        """The policy object that is applied to raw labels."""
        return LabelPolicy(**self.model_dump(exclude={"budget"}))


class ModelConfig(Section):
    """The ResNet-18 (He et al., arXiv:1512.03385)."""

    weights: str = "imagenet"
    """`imagenet`, `scratch`, or a path to torchvision / timm `resnet18` safetensors."""
    in_channels: Literal[1, 3] = 1
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    output_stride: Literal[16, 32] = 32
    """Pixels per cell of the last feature map; 16 dilates the last stage for finer maps at small image sizes."""
    freeze_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """Leading parts kept as loaded: 1 is the stem, 2..5 add layer1..layer4."""
    freeze_batchnorm: bool = False


class AugmentConfig(Section):
    """Label-safe augmentation on the device. There is no flip: it would move the heart to the right."""

    shift: Fraction = 0.05
    """Largest shift as a share of the side."""
    scale: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    rotate: Annotated[float, Field(ge=0.0, le=45.0)] = 7.0
    """Largest rotation in degrees."""
    brightness: Fraction = 0.1
    contrast: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.15


class TrainingConfig(Section):
    """The one training loop."""

    epochs: Count = 10
    batch_size: Count = 32
    learning_rate: Positive = 3e-4
    final_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-6
    warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-2
    clip_norm: Positive = 5.0
    class_weighting: Literal["none", "inverse_sqrt", "balanced"] = "none"
    """Weight of positives against negatives: 1, sqrt(n0/n1) or n0/n1; from 1 / `max_class_weight` up to it."""
    max_class_weight: Annotated[float, Field(ge=1.0)] = 10.0
    patience: Annotated[int, Field(ge=0)] = 0
    """Epochs without a better validation macro AUC before stopping; 0 never stops early."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    save_every: Count = 200
    """Steps between saves of the state to resume from (and at each epoch's end)."""
    log_every: Count = 10
    pixel_budget_gb: Positive = 4.0
    """Images are kept in device memory when the store is smaller than this, else read from disk."""


class EvaluationConfig(Section):
    """Scoring: thresholds and temperatures are fitted on validation."""

    batch_size: Count = 64
    threshold_rule: Literal["youden", "f1"] = "f1"
    abstention_alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the studies with a finding, and of those without, for which the truth may be ruled out
    (`evaluation.conformal`); with less, less is ruled out and fewer calls are made."""
    bootstrap_samples: Annotated[int, Field(ge=0)] = 1000
    calibration_bins: Annotated[int, Field(ge=2)] = 15


class ExplainConfig(Section):
    """Class-activation maps on the test split."""

    method: Literal["contrast_cam", "grad_cam", "grad_cam_pp", "hires_cam"] = "contrast_cam"
    labels: tuple[Annotated[Literal[MAPPED], _AnyCase], ...] | None = None  # type: ignore[valid-type]
    """Findings to map; None takes all but No Finding, which has no map."""
    examples_per_outcome: Annotated[int, Field(ge=0)] = 3
    """Images shown per finding for each of true positive, false positive and false negative."""
    mask_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of a map's pixels taken as its extent when it is compared with a mask by IoU."""


class PipelineConfig(Section):
    """Extent of the pipeline, and the gate that stops it."""

    teacher: bool = True
    """Go on after the CNN to teacher, student, comparison and failure analysis; needs reports."""
    min_val_auc: Fraction = 0.80
    """Least validation macro AUC of the CNN, per image."""


class LoraConfig(Section):
    """Low-rank adapters on the language model (Hu et al., LoRA, arXiv:2106.09685)."""

    rank: Count = 8
    alpha: Positive = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "conv.in_proj",
        "conv.out_proj",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )
    """Linear layers of a decoder layer that are adapted, by the names that LFM2 gives them."""
    layers: Count | None = None
    """Adapt the last so many decoder layers; None adapts all."""


class FineTuningConfig(Section):
    """Training of the teacher's adapters."""

    epochs: Count = 3
    batch_size: Count = 4
    """Studies per forward pass."""
    accumulate: Count = 4
    """Forward passes per optimizer step."""
    learning_rate: Positive = 2e-4
    final_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-6
    warmup_fraction: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    clip_norm: Positive = 1.0
    class_weighting: Literal["none", "inverse_sqrt", "balanced"] = "none"
    max_class_weight: Annotated[float, Field(ge=1.0)] = 10.0
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    bucket: Count = 32
    """Lengths are padded up to a multiple of this, so that few shapes are compiled."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base's floating-point weights; `auto` keeps what is stored, and takes float32 on the CPU."""
    patience: Annotated[int, Field(ge=0)] = 0
    save_every: Count = 200
    log_every: Count = 10


class TinyTeacherConfig(Section):
    """The small base that `make_tiny_teacher` writes: LFM2.5-VL's architecture, trained as a language model."""

    hidden_size: Annotated[int, Field(ge=32, multiple_of=32)] = 128
    layers: Annotated[int, Field(ge=2)] = 4
    """Decoder layers; every second one is attention, the others are short convolutions."""
    vocabulary: Annotated[int, Field(ge=800, le=65536)] = 2048
    epochs: Count = 4
    batch_size: Count = 16
    learning_rate: Positive = 3e-3
    max_tokens: Annotated[int, Field(ge=32)] = 256


class TeacherConfig(Section):
    """The teacher: a vision-language model that answers yes or no to each of the 14 findings."""

    base: str = "LiquidAI/LFM2.5-VL-1.6B"
    """A local folder, or a hub id (brought by `fetch_weights --what lfm`)."""
    run_name: Name = "lora_teacher_phase1"
    start_from: Name | None = None
    """Run of another teacher on the same base whose adapter this one starts from: phase 2, which reads the image too,
    starts from phase 1."""
    modality: Literal["text", "image", "image_text"] = "text"
    sections: Annotated[Sections, Field(min_length=1)] = ("findings",)
    """Sections of a report that it may read. MIMIC's labels were taken from the impression: a teacher that reads it
    learns the labeler."""
    section_mode: Literal["first", "all"] = "all"
    """`all`: every section named that a report has. `first`: the first of them."""
    max_tokens: Annotated[int, Field(ge=192)] = 768
    """Longest prompt with its 14 lines; longer reports are cut, at the end of the findings first."""
    image_size: Annotated[int, Field(ge=64, le=512, multiple_of=32)] = 256
    """Side in pixels of the image that the vision tower sees, unpadded; (size / 32)^2 image tokens."""
    batch_size: Count = 8
    """Studies per forward pass when scoring."""
    memory_limit_gb: Positive | None = None
    """Memory that training may take; None takes 70 % of the machine's."""
    lora: LoraConfig = LoraConfig()
    training: FineTuningConfig = FineTuningConfig()
    tiny: TinyTeacherConfig | None = None
    """If given, the pipeline makes the base, at the folder `base`, as `make_tiny_teacher` does."""


class DistillationConfig(Section):
    """The student: the ResNet-18 of `model`, taught by soft labels (Hinton et al., arXiv:1503.02531)."""

    run_name: Name = "student_v1"
    targets: Literal["teacher", "words", "hard", "smoothed", "shuffled"] = "teacher"
    """Soft labels beside the hard ones. Controls: `words` has those of the bag of words beside the teacher; `hard` has
    none; `smoothed` pulls each label towards its prevalence
    as strongly as the teacher does on average; `shuffled` gives each study the soft label of another one."""
    alpha: Fraction = 0.3
    """Weight of the hard labels; 1 - alpha is that of the soft ones."""
    temperature: Annotated[float, Field(ge=1.0)] = 2.0
    calibrated: bool = True
    """Divide the teacher's logits by the temperatures fitted on validation first."""
    init: Literal["model", "cnn"] = "model"
    """`model`: as `model.weights` says (ImageNet, scratch or a file). `cnn`: the weights of the CNN run."""
    feature_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the cosine distance to the teacher's features, for a teacher that sees the image; the controls `hard`
    and `smoothed` have no such term."""
    epochs: Count | None = None
    """None takes those of `training`."""
    learning_rate: Positive | None = None
    """None takes that of `training`."""


class ComparisonConfig(Section):
    """`compare_models` and its gates."""

    controls: tuple[Literal["words", "hard", "smoothed", "shuffled"], ...] = ()
    """Students that the pipeline trains beside the taught one, with that in the teacher's place."""
    graded: tuple[Annotated[Sections, Field(min_length=1)], ...] = ()
    """Further teachers that the pipeline trains, by the report sections that each may read."""
    min_retention: Fraction = 0.90
    """Least share of the teacher's macro AUC on validation that the student keeps."""


class FailureConfig(Section):
    """`failure_analysis`."""

    examples: Annotated[int, Field(ge=0)] = 12
    """Errors shown with image, map and report."""
    relabel: Annotated[int, Field(ge=0)] = 50
    """Items of the sheet for reading images anew; half of them errors."""
    teacher_margin: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """The teacher is confidently against a label where its probability has gone at least this share of the way from
    its threshold to the other end of the scale."""
    rare_share: Fraction = 0.05
    """A finding that fewer of the training studies have is rare."""
