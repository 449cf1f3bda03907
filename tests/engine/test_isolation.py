"""What surrounds a model changes neither it nor results: precision, autocast, compiled parts, threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from depass_lightning import DePass, DePassError, Heads, Tokens
from depass_lightning.engine.isolation import exact
from depass_lightning.errors import DePassWarning
from depass_lightning.faithfulness import removal_curves
from depass_lightning.models.load import load_model
from tests.engine.test_untouched import must_stay_untouched
from tests.reference.models import distance, padded, prompt
from tests.reference.zoo import build

pytestmark = pytest.mark.covering

CPU = torch.device("cpu")


@contextmanager
def put_back(read: Callable[[], Any], write: Callable[[Any], object]) -> Iterator[None]:
    found = read()
    try:
        yield
    finally:
        write(found)


def precisions(model: nn.Module) -> tuple[list[str], Any]:
    """The precision of matrix products at each pass of the model, by a hook of the caller's."""
    seen: list[str] = []

    def keep(*_hook: object) -> None:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]

    return seen, model.model.layers[0].mlp.down_proj.register_forward_hook(keep)  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_matrix_products_are_held_off(precision: str) -> None:
    model = build("llama")
    seen, _ = precisions(model)
    with put_back(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision):
        torch.set_float32_matmul_precision(precision)
        model(input_ids=prompt(5)[None])
        assert seen.pop() in ("tf32", "bf16")
        DePass(model).attribute(input_ids=prompt(5)[None], target=5)
        assert set(seen) == {"ieee"}
        assert torch.get_float32_matmul_precision() == precision
        with exact(CPU):
            with exact(CPU):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="a later torch's names")
@pytest.mark.parametrize("one", [True, False])
def test_coarse_matrix_products_by_their_later_names(one: bool) -> None:
    backends: Any = torch.backends
    matmul = backends.mkldnn.matmul
    try:
        if one:
            matmul.fp32_precision = "bf16"
        else:
            backends.fp32_precision = "tf32"
        found = matmul.fp32_precision, backends.cuda.matmul.fp32_precision
        with exact(CPU):
            assert {matmul.fp32_precision, backends.cuda.matmul.fp32_precision} <= {"ieee", "none"}
        assert (matmul.fp32_precision, backends.cuda.matmul.fp32_precision) == found
    finally:
        for own in (backends, matmul, backends.cuda.matmul):
            own.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_one_thread_does_not_put_back_what_another_needs() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exact(CPU):
            inside.set()
            leave.wait(10)

    with put_back(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision):
        torch.set_float32_matmul_precision("high")
        with exact(CPU):
            thread = threading.Thread(target=other)
            thread.start()
            inside.wait(10)
        assert torch.get_float32_matmul_precision() == "highest"
        leave.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "high"


def _deterministic() -> Any:
    return put_back(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms)


def _default_dtype() -> Any:
    return put_back(torch.get_default_dtype, torch.set_default_dtype)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], object]]] = {
    "deterministic": (_deterministic, lambda: torch.use_deterministic_algorithms(True)),
    "half by default": (_default_dtype, lambda: torch.set_default_dtype(torch.bfloat16)),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama-biases", "mixtral"])
def test_settings_of_the_process_change_nothing(name: str, setting: str) -> None:
    model = build(name)
    ids, mask = padded([prompt(7), prompt(4)], "left")
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "target": 5}
    ways: list[dict[str, Any]] = [{"source": Tokens()}, {"source": Heads()}, {"rule": "taylor"}]
    expected = [own for way in ways for own in DePass(model).attribute(**batch, **way)]
    around, change = SETTINGS[setting]
    with around():
        change()
        depass = DePass(model)
        given = [own for way in ways for own in depass.attribute(**batch, **way)]
    for one, two in zip(given, expected, strict=True):
        assert one.value == two.value
        assert torch.equal(one.scores, two.scores)


def test_the_autocast_that_accelerate_puts_into_forward() -> None:
    model, tokenizer = load_model("tiny")
    text = "When Mary and John went to the store, John gave a drink to"
    old = DePass(model, tokenizer)
    expected = old.attribute(text)
    (curves,) = removal_curves(model, [expected], expected.target_ids)
    said = old.attribute_generation(text, max_new_tokens=2)
    prepared: Any = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    coarse = prepared(**tokenizer(text, return_tensors="pt")).logits[0, -1].max().item()
    assert abs(coarse - expected.value) > 1e-3
    with must_stay_untouched(prepared):
        for depass in (old, DePass(prepared, tokenizer)):
            given = depass.attribute(text)
            assert given.value == expected.value
            assert torch.equal(given.scores, expected.scores)
            again = depass.attribute_generation(text, max_new_tokens=2)
            assert torch.equal(again.scores, said.scores)
        assert removal_curves(prepared, [expected], expected.target_ids) == [curves]


@pytest.mark.parametrize("way", ["mlp", "mlp in place", "block", "head", "model in place"])
@pytest.mark.covering(3)
def test_compiled_parts_run_as_they_are_written(way: str) -> None:
    model, tokenizer = load_model("tiny")
    expected = DePass(model, tokenizer).attribute("The capital of Norway is", " Oslo")
    for i, block in enumerate(model.model.layers):
        if way == "mlp":
            block.mlp = torch.compile(block.mlp, backend="eager")
        elif way == "mlp in place":
            block.mlp.compile(backend="eager")
        elif way == "block":
            model.model.layers[i] = torch.compile(block, backend="eager")
    if way == "head":
        model.lm_head = torch.compile(model.lm_head, backend="eager")
    if way == "model in place":
        model.compile(backend="eager")
    with torch.no_grad():
        model(torch.tensor([[0, 5, 9]]))  # compiled before DePass registers its hooks
    with must_stay_untouched(model):
        given = DePass(model, tokenizer).attribute("The capital of Norway is", " Oslo")
    assert given.value == pytest.approx(expected.value, abs=1e-5)
    assert distance(given.scores, expected.scores) < 1e-5
    torch.compiler.reset()


def test_a_model_without_values_is_named() -> None:
    with torch.device("meta"):
        model = type(build("llama"))(build("llama").config)
    with pytest.raises(DePassError, match=r"'model\.embed_tokens\.weight' .* meta device"):
        DePass(model)


def in_threads(*works: Callable[[], Any], times: int) -> list[Exception]:
    """What went wrong in threads that each do one thing several times, all beginning together."""
    errors: list[Exception] = []
    together = threading.Barrier(len(works))

    def repeat(work: Callable[[], Any]) -> None:
        together.wait(10)
        try:
            for _ in range(times):
                work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return errors


def test_threads_take_turns_on_a_model() -> None:
    model = build("llama")
    model.set_attn_implementation("sdpa")
    first, second = DePass(model), DePass(model)
    expected = {
        length: [
            first.attribute(input_ids=prompt(length)[None], target=5)[0].scores,
            first.attribute(input_ids=prompt(length)[None], target=5, rule="taylor")[0].scores,
            list(first.decompose_layers(input_ids=prompt(length)[None]))[-1].states,
        ]
        for length in (5, 9)
    }

    def explain(depass: DePass, length: int) -> Callable[[], None]:
        def work() -> None:
            ids = prompt(length)[None]
            given = [
                depass.attribute(input_ids=ids, target=5)[0].scores,
                depass.attribute(input_ids=ids, target=5, rule="taylor")[0].scores,
                list(depass.decompose_layers(input_ids=ids))[-1].states,
            ]
            for one, two in zip(given, expected[length], strict=True):
                assert torch.equal(one, two)

        return work

    with must_stay_untouched(model):
        assert in_threads(explain(first, 5), explain(second, 9), explain(first, 9), times=4) == []


def test_a_plain_pass_in_another_thread_is_right() -> None:
    model = build("llama")
    model.set_attn_implementation("sdpa")
    depass, ids = DePass(model), prompt(9)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    scores = depass.attribute(input_ids=ids, target=5)[0].scores

    def plain() -> None:
        with torch.no_grad():
            for _ in range(10):
                assert torch.equal(model(input_ids=ids).logits, logits)

    def explain() -> None:
        assert torch.equal(depass.attribute(input_ids=ids, target=5)[0].scores, scores)

    assert in_threads(plain, explain, plain, times=8) == []
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("begins", ["before", "meanwhile"])
def test_a_plain_pass_does_not_meet_a_changed_model(begins: str) -> None:
    """It begins before DePass does and is waited for, or meanwhile and waits."""
    model, ids = build("llama"), prompt(6)[None]
    model.set_attn_implementation("sdpa")
    depass, found = DePass(model), []
    inside, go_on = threading.Event(), threading.Event()
    layers: Any = model.model.layers
    waiting = "explain" if begins == "meanwhile" else "plain"

    def pause(*_hook: object) -> None:
        if threading.current_thread().name == waiting:
            inside.set()
            go_on.wait(10)

    def look(*_hook: object) -> None:
        if threading.current_thread().name == "plain":
            found.append(model.config._attn_implementation)

    def plain() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    def explain() -> None:
        depass.attribute(input_ids=ids, target=5)

    layers[0].register_forward_pre_hook(pause)
    layers[1].register_forward_pre_hook(look)
    works = {"plain": plain, "explain": explain}
    threads = {name: threading.Thread(target=work, name=name) for name, work in works.items()}
    threads[waiting].start()
    inside.wait(10)
    (other,) = [thread for name, thread in threads.items() if name != waiting]
    other.start()
    other.join(0.2)
    assert other.is_alive()
    go_on.set()
    for thread in threads.values():
        thread.join(10)
        assert not thread.is_alive()
    assert found == ["sdpa"]


def test_a_model_that_changed_since_is_warned_of_once() -> None:
    model = build("llama")
    depass = DePass(model)
    ids, mask = padded([prompt(7), prompt(4)], "left")

    def double(_module: object, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        return 2 * output

    handle = model.model.layers[1].mlp.register_forward_hook(double)
    with pytest.warns(DePassWarning, match=r"miss the value .*a hook") as warned:
        depass.attribute(input_ids=ids, attention_mask=mask, target=5)
    assert len(warned) == 1
    with pytest.warns(DePassWarning):
        depass.attribute(input_ids=ids, attention_mask=mask, target=[[5, 6], [7]])
    with pytest.warns(DePassWarning):
        depass.attribute_generation(input_ids=ids[:1], max_new_tokens=2)
    depass.attribute(input_ids=ids, attention_mask=mask, target=5, compat="paper_code")  # never sums
    handle.remove()
    depass.attribute(input_ids=ids, attention_mask=mask, target=5)


def phi() -> Any:
    model: Any = build("phi")
    assert model.lm_head.bias is not None
    return model


def test_tokens_that_the_head_rules_out() -> None:
    model = phi()
    expected = DePass(model).attribute(input_ids=prompt(5)[None], target=7)[0]
    with torch.no_grad():
        model.lm_head.bias[50:] = -torch.inf
    depass = DePass(model)
    given = depass.attribute(input_ids=prompt(5)[None], target=7)[0]
    assert given.value == expected.value
    assert torch.equal(given.scores, expected.scores)
    with pytest.raises(DePassError, match="'55' is -inf: it rules the token out"):
        depass.attribute(input_ids=prompt(5)[None], target=55)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_of_the_head_that_are_no_numbers_are_named(value: float) -> None:
    model = phi()
    depass = DePass(model)
    with torch.no_grad():
        model.lm_head.weight[53] = value
        model.lm_head.bias[57] = value
    for explain in (lambda: DePass(model), lambda: depass.attribute(input_ids=prompt(5)[None], target=7)):
        with pytest.raises(DePassError, match=r"2 of 61 tokens .*\(token 53, 57\)"):
            explain()
