"""Fine-tuning: batches, accumulated gradients, masked labels, what moves and what must not, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from toy_teacher import arrays_of, opened, perturbed_adapters, prompts_of, quantized_copy

from mlx_cxr.core.config_schema import FineTuningConfig, LoraConfig, TeacherConfig
from mlx_cxr.core.labels import LABELS
from mlx_cxr.teacher.fine_tuning import BatchPlan, accumulating_step, batch_arrays, lora_task, validator
from mlx_cxr.teacher.lora import attach_lora
from mlx_cxr.teacher.prompt import PromptFormat
from mlx_cxr.teacher.readout import answer_direction, finding_logits
from mlx_cxr.teacher.scoring import prompt_embeddings, score
from mlx_cxr.training.loop import TrainingDataError, TrainingDivergedError
from mlx_cxr.training.losses import masked_bce
from mlx_cxr.training.optimizer import make_optimizer

WORDS = ("Edema.", "Clear lungs.", "The heart is enlarged.", "No acute process.", "Large heart", "Clear", "No", "Edema")


def settings_of(**training: object) -> TeacherConfig:
    chosen = {"learning_rate": 1e-2, "warmup_fraction": 0.0, "clip_norm": 1e6, "bucket": 32} | training
    return TeacherConfig(training=FineTuningConfig(**chosen))


def random_targets(count: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (count, len(LABELS))).astype(np.float32)


def stepped(
    folder, passes: list[list[int]], targets: np.ndarray | None = None, steps: int = 1, dropout: float = 0.0, **training
) -> tuple[dict[str, np.ndarray], float, float]:
    """Adapters, last loss and gradient norm after `steps` steps over `passes` of studies."""
    base = opened(folder)
    attach_lora(base.model, LoraConfig(rank=4, dropout=dropout), seed=1)
    form = PromptFormat.of(base.tokenizer, max_tokens=320)
    prompts, config = prompts_of(form, WORDS), settings_of(**training)
    targets = random_targets() if targets is None else targets
    optimizer = make_optimizer(
        learning_rate=1e-2, final_learning_rate=1e-2, warmup_fraction=0.0, weight_decay=0.0, total_steps=10
    )
    optimizer.init(base.model.trainable_parameters())
    step = accumulating_step(base.model, form, optimizer, masked_bce(), config, arrays=3)
    base.model.train()
    for number in range(steps):
        mx.random.seed(number)
        arrays = []
        for rows in passes:
            arrays += [*batch_arrays([prompts[i] for i in rows], config.training.bucket), mx.array(targets[rows])]
        loss, norm = step(*arrays)
        mx.eval(loss, norm, base.model.state)
    weights = {name: np.array(value) for name, value in tree_flatten(base.model.trainable_parameters())}
    return weights, loss.item(), norm.item()


def close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], slack: float) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=slack, err_msg=name)


def test_k_passes_of_b_are_one_pass_of_k_times_b(toy):
    """Loss, gradient norm and the weights after two steps; AdamW's normalized step would hide nothing but a scale."""
    whole = stepped(toy.base, [[0, 1, 2, 3, 4, 5, 6, 7]], steps=2)
    parts = stepped(toy.base, [[0, 1], [2, 3], [4, 5], [6, 7]], steps=2)
    assert parts[1] == pytest.approx(whole[1], rel=1e-5)
    assert parts[2] == pytest.approx(whole[2], rel=1e-4)
    close(parts[0], whole[0], 2e-4)
    moved = stepped(toy.base, [[0, 1, 2, 3, 4, 5, 6, 7]], steps=1)
    assert max(np.abs(whole[0][name] - moved[0][name]).max() for name in whole[0]) > 5e-3


def test_checkpointing_trains_alike(toy):
    kept = stepped(toy.base, [[0, 1, 2], [3, 4, 5]], steps=2)
    recomputed = stepped(toy.base, [[0, 1, 2], [3, 4, 5]], steps=2, gradient_checkpointing=True)
    assert recomputed[1:] == pytest.approx(kept[1:], rel=1e-4)
    close(recomputed[0], kept[0], 2e-4)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
def test_the_gradient_under_dropout_is_the_slope_of_the_loss(toy, checkpoint):
    """Against a difference quotient along the gradient, with the same draws.

    A backward pass that recomputes with another dropout mask has the gradient of another network.
    """
    base = opened(toy.base)
    attach_lora(base.model, LoraConfig(rank=4, dropout=0.5), seed=1)
    perturbed_adapters(base.model)
    form = PromptFormat.of(base.tokenizer, max_tokens=320)
    ids, read = batch_arrays(prompts_of(form, WORDS[:3]), 32)
    language, loss, targets = base.model.language_model, masked_bce(), mx.array(random_targets(3))
    direction = answer_direction(language, form.yes, form.no)
    base.model.train()

    def objective() -> mx.array:
        embeddings = prompt_embeddings(language, form, ids)
        return loss(finding_logits(language, embeddings, read, direction, checkpoint), targets)

    state = [base.model.state, mx.random.state]
    compiled = mx.compile(nn.value_and_grad(base.model, objective), inputs=state, outputs=state)
    mx.random.seed(5)
    _, gradients = compiled()
    flat = dict(tree_flatten(gradients))
    size = np.sqrt(sum(float(mx.sum(g * g)) for g in flat.values()))
    start = dict(tree_flatten(base.model.trainable_parameters()))

    def at(distance: float) -> float:
        moved = [(name, start[name] + distance / size * gradient) for name, gradient in flat.items()]
        base.model.load_weights(moved, strict=False)
        mx.random.seed(5)
        return objective().item()

    assert (at(2e-3) - at(-2e-3)) / 4e-3 == pytest.approx(size, rel=0.02)


def test_the_bucket_changes_nothing_but_the_padding(toy):
    small, large = (stepped(toy.base, [[0, 1, 2]], bucket=bucket) for bucket in (1, 128))
    assert small[1:] == pytest.approx(large[1:], rel=1e-4)


def test_masked_labels_have_no_influence(toy):
    """A study without labels is as if it were not there, and a finding without labels is left out of the mean."""
    targets = random_targets()
    masked = targets.copy()
    masked[:, 3] = np.nan
    masked[5] = np.nan
    base = opened(toy.base)
    form = PromptFormat.of(base.tokenizer, max_tokens=320)
    with_masks = stepped(toy.base, [list(range(8))], masked)
    without_row = stepped(toy.base, [[0, 1, 2, 3, 4, 6, 7]], masked)
    assert with_masks[1:] == pytest.approx(without_row[1:], rel=1e-5), "a study without labels is as if not there"
    close(with_masks[0], without_row[0], 2e-4)
    assert form.order[3] == LABELS[3]
    nothing = stepped(toy.base, [[0, 1]], np.full((8, 14), np.nan, np.float32))
    assert nothing[1:] == (0.0, 0.0)


def test_a_step_moves_the_adapters_only(toy, tmp_path):
    for folder in (toy.base, quantized_copy(tmp_path / "q4", toy.base, 4)):
        base = opened(folder)
        attach_lora(base.model, LoraConfig(rank=4), seed=1)
        before = arrays_of(base.model)
        form = PromptFormat.of(base.tokenizer, max_tokens=320)
        studies = SimpleNamespace(
            prompts=prompts_of(form, WORDS),
            lengths=lambda form=form: np.array([len(p.ids) for p in prompts_of(form, WORDS)]),
        )
        config = settings_of(batch_size=2, accumulate=2, epochs=1)
        task = lora_task(base, form, studies, random_targets(), None, masked_bce(), lambda _: {}, config, 0)
        task.model.train()
        for batch in task.batches(0, 0):
            mx.eval(*task.step(*batch))
        after = arrays_of(base.model)
        for name, value in after.items():
            assert (value != before[name]).any() == ("lora_" in name), name


def plan_of(lengths: list[int], **options: int) -> BatchPlan:
    return BatchPlan(np.array(lengths), **({"batch_size": 4, "accumulate": 2, "seed": 0} | options))


def flat(epoch: list[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([items for group in epoch for items in group])


def test_the_plan_takes_each_study_at_most_once_and_is_a_function_of_the_epoch():
    lengths = np.random.default_rng(0).integers(100, 400, 203)
    plan = plan_of(lengths.tolist())
    assert plan.steps == 203 // 4 // 2
    first, second = plan.epoch(0), plan.epoch(1)
    for epoch in (first, second):
        taken = flat(epoch)
        assert len(taken) == len(set(taken.tolist())) == plan.steps * 8
        assert all(len(group) == 2 and all(len(items) == 4 for items in group) for group in epoch)
    again = plan_of(lengths.tolist()).epoch(0)
    np.testing.assert_array_equal(flat(again), flat(first))
    assert (flat(first) != flat(second)).any()
    other = plan_of(lengths.tolist(), seed=1).epoch(0)
    assert (flat(first) != flat(other)).any()
    # What an epoch leaves out differs, so that every study is seen in time.
    seen = {int(i) for epoch in range(8) for group in plan.epoch(epoch) for items in group for i in items}
    assert seen == set(range(203))


def test_studies_of_a_pass_are_of_like_length_and_passes_are_in_random_order():
    lengths = np.random.default_rng(0).integers(100, 400, 256)
    plan = plan_of(lengths.tolist())
    passes = [items for group in plan.epoch(0) for items in group]
    padding = np.mean([lengths[items].max() - lengths[items].mean() for items in passes])
    drawn = np.random.default_rng(1).permutation(256).reshape(-1, 4)
    unsorted = np.mean([lengths[items].max() - lengths[items].mean() for items in drawn])
    assert padding < 0.2 * unsorted
    means = [lengths[items].mean() for items in passes]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


@pytest.mark.parametrize(("studies", "expected"), [(3, (3, 1, 1)), (4, (4, 1, 1)), (7, (4, 1, 1)), (8, (4, 2, 1))])
def test_few_studies_make_smaller_passes(studies, expected):
    plan = plan_of([200] * studies)
    assert (plan.batch_size, plan.accumulate, plan.steps) == expected
    assert len(plan.epoch(3)) == plan.steps
    with pytest.raises(TrainingDataError, match="no training study can be read"):
        plan_of([])


def test_batches_resume_in_the_middle_of_an_epoch_and_count_their_tokens(toy, base, form):
    prompts = prompts_of(form, [word * (i + 1) for i, word in enumerate(WORDS)])
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    studies = SimpleNamespace(prompts=prompts, lengths=lambda: lengths)
    adapted = opened(toy.base)
    attach_lora(adapted.model, LoraConfig(rank=2), 0)
    config = settings_of(batch_size=2, accumulate=2, epochs=2)
    task = lora_task(adapted, form, studies, random_targets(), None, masked_bce(), lambda _: {}, config, 0)
    assert task.steps_per_epoch == 2
    whole, rest = list(task.batches(1, 0)), list(task.batches(1, 1))
    assert len(rest) == 1
    for ours, theirs in zip(rest[0], whole[1], strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))
    assert task.samples(0, 1) == 4
    assert task.tokens(0, 0) == lengths.sum()
    (last,) = task.batches(0, 1)
    assert task.tokens(0, 1) == sum((np.array(ids) != 0).sum() for ids in last[::3])


def test_each_study_has_the_embeddings_of_its_row(toy, form):
    """Labelled studies in turn stand several times in the training, and their embeddings once."""
    base = opened(toy.base)
    attach_lora(base.model, LoraConfig(rank=2), 0)
    prompts, targets = prompts_of(form, WORDS), random_targets()
    lengths = np.array([len(prompt.ids) for prompt in prompts])
    studies = SimpleNamespace(prompts=prompts, lengths=lambda: lengths)
    rows = np.resize([2, 0], len(prompts))
    images = np.arange(3, dtype=np.float16)[:, None, None] * np.ones((3, 4, 8), np.float16)
    config = settings_of(batch_size=2, accumulate=2, epochs=1)
    arguments = (base, form, studies, targets, images, masked_bce(), lambda _: {}, config, 0)
    seen = 0
    for batch in lora_task(*arguments, image_rows=rows).batches(0, 0):
        for wanted, shown in zip(batch[2::4], batch[3::4], strict=True):
            for target, image in zip(np.array(wanted), np.array(shown), strict=True):
                (study,) = np.flatnonzero([np.array_equal(target, row, equal_nan=True) for row in targets])
                assert (image == rows[study]).all()
                seen += 1
    assert seen == 8


class FewStudies(list):
    """Studies with what the validator reads."""

    def __init__(self, form: PromptFormat, raw: np.ndarray) -> None:
        super().__init__(range(len(raw)))
        self.prompts, self.raw_labels = prompts_of(form, WORDS[: len(raw)]), raw


def validate_with(base, form: PromptFormat, raw: np.ndarray) -> Callable:
    return validator(base, form, FewStudies(form, raw), None, TeacherConfig(batch_size=3))


def test_validation_counts_uncertain_and_empty_as_absent(base, form):
    from sklearn.metrics import log_loss, roc_auc_score

    raw = np.full((8, 14), np.nan, np.float32)
    raw[:, 3] = [1, 0, 1, 1, 0, -1, 0, 1]
    raw[:2, 5] = 1
    figures = validate_with(base, form, raw)(base.model)
    logits = score(base, form, prompts_of(form, WORDS), None, TeacherConfig()).logits
    targets = (raw == 1).astype(int)
    aucs = [roc_auc_score(targets[:, i], logits[:, i]) for i in (3, 5)]
    assert figures["macro_auc"] == pytest.approx(np.mean(aucs), abs=1e-9)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert figures["loss"] == pytest.approx(log_loss(targets.ravel(), p.ravel()), rel=1e-4)


def test_validation_without_both_classes_is_refused_before_training(base, form):
    with pytest.raises(TrainingDataError, match="4 validation studies can be read and have both classes of no label"):
        validate_with(base, form, np.zeros((4, 14), np.float32))


def test_logits_that_are_no_numbers_end_the_run(toy, form):
    raw = np.zeros((4, 14), np.float32)
    raw[0] = 1
    base = opened(toy.base)
    validate = validate_with(base, form, raw)
    base.model.language_model.model.embedding_norm.weight = mx.full((64,), float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"lower teacher.training.learning_rate"):
        validate(base.model)
