"""Probes: the states that they read, what they learn, and what becomes of them as targets and sources."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from depass_lightning import DePass, Tokens
from depass_lightning.errors import DePassError
from depass_lightning.linear_probes import LinearProbe, fit_probes, hidden_states, train_probe, train_probes
from depass_lightning.tasks import load_texts
from depass_lightning.tasks.texts import Texts
from tests.reference.models import build, padded, prompt, real_states

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def tiny():
    return DePass.from_pretrained("tiny")


@pytest.fixture(scope="module")
def languages(tiny):
    """Relations stand in for languages: five labels."""
    train, test = (load_texts("language", split=split) for split in ("train", "test"))
    return train_probes(tiny, train, test)


def drawn(count, hidden, labels, seed=0):
    """Draw states whose labels can be told apart, on features of very different sizes."""
    generator = np.random.default_rng(seed)
    names = [labels[number % len(labels)] for number in range(count)]
    centres = np.random.default_rng(99).normal(size=(len(labels), hidden))
    sizes = np.logspace(-2, 2, hidden)
    states = generator.normal(size=(count, hidden)) + centres[[labels.index(name) for name in names]]
    return torch.from_numpy(states * sizes + 3 * sizes), names


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_those_that_the_model_computes(side):
    model = build("qwen2", dtype=torch.float64)
    rows = [prompt(length, seed=length) for length in (4, 9, 6, 5)]
    ids, mask = padded(rows, side)
    depass = DePass(model)
    last = hidden_states(depass, input_ids=ids, attention_mask=mask, batch_size=3)
    every = hidden_states(depass, input_ids=ids, attention_mask=mask, position="all", layers=[-1, 3])
    assert last.shape == (4, 4, 36)
    for index, row in enumerate(rows):
        expected = torch.stack(real_states(model, row))
        torch.testing.assert_close(last[:, index], expected[:, -1])
        torch.testing.assert_close(every[index], expected[[2, 3]])
        second = hidden_states(depass, input_ids=row[None], layers=[1], position=1)
        torch.testing.assert_close(second[0, 0], expected[1, 1])


def test_states_are_those_that_are_decomposed(tiny):
    (states,) = hidden_states(tiny, [PROMPT], layers=[2])
    parts = tiny.decompose(PROMPT, source=Tokens(), to_layer=2)
    torch.testing.assert_close(states[0], parts.states.sum(0)[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layers": [4]}, "4"), ({"layers": []}, "empty"), ({"position": 40}, "40"), ({"position": -40}, "-40")],
)
def test_states_that_there_are_not(tiny, options, message):
    with pytest.raises(DePassError, match=message):
        hidden_states(tiny, [PROMPT], **options)


@pytest.mark.parametrize("labels", [["no", "yes"], ["a", "b", "c", "d"]])
def test_folded_weights_give_the_logits_of_the_standardised_fit(labels):
    states, names = drawn(160, 12, labels)
    judged, right = drawn(80, 12, labels, seed=1)
    probe = train_probe(states, names, judged, right, layer=2)
    twin = make_pipeline(
        StandardScaler(), LogisticRegression(solver="saga", max_iter=1000, random_state=0)
    ).fit(states.numpy(), names)
    expected = twin.decision_function(judged.numpy())
    found = probe.logits(judged).numpy()
    if len(labels) == 2:
        np.testing.assert_allclose(found[:, 1] - found[:, 0], expected, rtol=1e-6, atol=1e-8)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    assert probe.predict(judged) == twin.predict(judged.numpy()).tolist()
    assert probe.fit.accuracy == twin.score(judged.numpy(), right) > 0.8
    assert probe.fit.majority == 1 / len(labels)
    assert (probe.fit.texts, probe.fit.held_out, probe.fit.converged) == (160, 80, True)


def test_a_fit_that_did_not_converge_says_so():
    states, names = drawn(100, 12, ["no", "yes"])
    stopped = train_probe(states, names, states, names, layer=0, iterations=2)
    assert (stopped.fit.converged, stopped.fit.iterations) == (False, 2)


def test_labels_without_a_trace_are_not_found():
    states, _ = drawn(400, 8, ["x", "y"])
    names = np.random.default_rng(5).choice(["no", "yes"], 400).tolist()
    probe = train_probe(states[:200], names[:200], states[200:], names[200:], layer=0)
    assert 0.38 < probe.fit.accuracy < 0.62


def test_the_logit_as_a_target_is_the_probes_own(tiny, languages):
    probe = languages.probes[1]
    (state,) = hidden_states(tiny, [PROMPT], layers=[2])
    logits = probe.logits(state)[0]
    for place, label in enumerate(probe.labels):
        found = tiny.attribute(PROMPT, probe.target(label))
        assert found.value == pytest.approx(float(logits[place] - logits.mean()), rel=1e-4)
        assert float(found.scores.sum()) == pytest.approx(found.value, rel=1e-4)
    assert probe.predict(state) == ["capital"]


def test_two_labels_are_targets_with_opposite_signs(tiny):
    texts = Texts("pair", *_of("capital", "language"))
    probe = train_probes(tiny, texts, texts, layers=[1]).best
    (state,) = hidden_states(tiny, [PROMPT], layers=[1])
    difference = float(probe.logits(state)[0, 1] - probe.logits(state)[0, 0])
    assert probe.labels == ("capital", "language")
    assert difference < 0
    for label, sign in (("language", 1), ("capital", -1)):
        assert tiny.attribute(PROMPT, probe.target(label)).value == pytest.approx(sign * difference, rel=1e-4)


def _of(*labels):
    found = load_texts("language")
    kept = [i for i, label in enumerate(found.labels) if label in labels]
    return [found.texts[i] for i in kept], [found.labels[i] for i in kept]


def test_the_subspace_holds_all_that_tells_the_labels_apart(tiny, languages):
    probe = languages.probes[0]
    assert probe.basis.shape == (4, 64)
    (state,) = hidden_states(tiny, [PROMPT], layers=[1])
    parts = tiny.decompose(PROMPT, source=probe.subspace("language"), to_layer=1)
    assert parts.names[:2] == ["language", "rest"]
    own, rest = (probe.logits(part[-1]) for part in parts.states[:2])
    assert float((own - probe.bias).std()) > 0.1
    torch.testing.assert_close(
        own - own.mean(), (whole := probe.logits(state)[0]) - whole.mean(), rtol=1e-4, atol=1e-4
    )
    assert float((rest - probe.bias - (rest - probe.bias).mean()).abs().max()) < 1e-4


def test_probes_find_what_there_is_and_the_best_layer_is_chosen_on_training_texts(languages):
    assert [probe.layer for probe in languages.probes] == [1, 2, 3]
    assert languages.probes[0].fit.accuracy > 0.9 > 0.3 > languages.probes[0].fit.majority
    top = max(languages.validation)
    assert languages.best is languages.probes[languages.validation.index(top)]


def test_validation_is_on_texts_that_were_not_fitted():
    states = torch.randn(2, 60, 80, generator=torch.Generator().manual_seed(1))
    names = np.random.default_rng(2).choice(["no", "yes"], 60).tolist()
    found = fit_probes(states, names, states, names, layers=[4, 7])
    assert [probe.fit.accuracy for probe in found.probes] == [1.0, 1.0]  # of what it was fitted on
    assert max(found.validation) < 0.9


def test_a_probe_comes_back_from_its_file(tmp_path, languages):
    probe = languages.best
    path = probe.save(tmp_path / "deep" / "probe.safetensors")
    found = LinearProbe.load(path)
    assert torch.equal(found.weight, probe.weight)
    assert torch.equal(found.bias, probe.bias)
    assert (found.labels, found.layer, found.fit) == (probe.labels, probe.layer, probe.fit)
    with pytest.raises(DePassError, match="no file"):
        LinearProbe.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(DePassError, match="cannot be read"):
        LinearProbe.load(tmp_path / "bad.safetensors")


def test_mistakes_are_named(tiny, languages):
    states, names = drawn(20, 4, ["a", "b"])
    with pytest.raises(DePassError, match="no label 'colour'; it has birthplace, capital"):
        languages.best.target("colour")
    with pytest.raises(DePassError, match="give one a state"):
        train_probe(states, names[:-1], states, names, layer=0)
    with pytest.raises(DePassError, match="at least two labels"):
        train_probe(states, ["a"] * 20, states, ["a"] * 20, layer=0)
    with pytest.raises(DePassError, match="no training text has: c"):
        train_probe(states, names, states, ["c", *names[1:]], layer=0)
    few = Texts("few", ["a"] * 9, ["x", "y", "z"] * 3)
    with pytest.raises(DePassError, match="too few"):
        train_probes(tiny, few, few)
