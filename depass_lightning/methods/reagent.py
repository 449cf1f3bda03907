"""ReAGent: importance that is updated by how much random replacements lower the answer's probability.

Source: Zhao & Shan, "ReAGent: A Model-agnostic Feature Attribution Method for Generative Language Models"
(2024, arXiv 2402.00794). The paper draws replacements from RoBERTa. Here they are drawn from the 50 tokens
that the model itself finds likeliest at that position, so that no second model is needed.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError
from depass_lightning.methods.model_runs import Batch, run
from depass_lightning.methods.random_scores import seed_of
from depass_lightning.methods.token_subsets import SubsetBaseline, Values, removed_positions
from depass_lightning.sources import Source

CHOICES = 50  # tokens that a replacement is drawn from
LIMIT = 1 - 1e-9  # of the probability that is lost, whose logarithmic odds are finite


class ReAGent(SubsetBaseline):
    """The mean importance of several runs, each of which starts from random importance.

    A step replaces a random part of the tokens or spans. With `d` the probability that the answer loses, the
    logarithmic importance of the replaced part grows by `log((1 + d) / (1 - d))`, and that of the rest falls
    by as much. A run stops when the answer is among the likeliest tokens with only the most important part
    kept and the rest replaced. Scores are a softmax over the prompt; runs that never stop count only if all
    of them do not. They explain the probability of the target's first token: a foil plays no part.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`, whose tokens go together.
        samples: the number of runs.
        steps: the most steps of a run, each of which takes two passes.
        ratio: the fraction of the prompt that a step replaces, and that the test for stopping keeps.
        top: a run stops with the answer among that many of the likeliest tokens.
        seed: of the draws.
        rows: the number of changed prompts in one pass.

    Raises:
        DePassError: a number is less than one, or the ratio is not between 0 and 1.
    """

    name: ClassVar[str] = "reagent"

    def __init__(
        self,
        depass: DePass,
        source: Source | None = None,
        *,
        samples: int = 8,
        steps: int = 32,
        ratio: float = 0.3,
        top: int = 3,
        seed: int = 0,
        rows: int = 64,
    ) -> None:
        super().__init__(depass, source, samples=samples, seed=seed, rows=rows)
        if steps < 1 or top < 1:
            raise DePassError(f"{self.name}: steps and top must be at least 1; got {steps} and {top}")
        if not 0 < ratio < 1:
            raise DePassError(f"{self.name}: ratio must be between 0 and 1; got {ratio}")
        self.steps, self.ratio, self.top = steps, ratio, top

    @override
    def fit(self, values: Values, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = max(1, round(self.ratio * count))
        whole = values(torch.ones(1, count, dtype=torch.bool))[0, 0]
        scores = torch.rand(self.samples, count, generator=generator, dtype=torch.float64)
        running = torch.ones(self.samples, dtype=torch.bool)
        for _ in range(self.steps):
            order = torch.rand(self.samples, count, generator=generator).argsort(1)
            replaced = (order < size)[running]  # [run, candidate]
            lost = (whole - values(~replaced)[:, :1]).cpu().double().clamp(-LIMIT, LIMIT)
            scores[running] += torch.where(replaced, 1, -1) * 2 * lost.atanh()
            kept = (-scores[running]).argsort(1).argsort(1) < size
            running[running.clone()] = values(kept)[:, 1].cpu() > self.top
            if not running.any():
                break
        return scores.softmax(1)[running if running.all() else ~running].mean(0)

    @override
    def _values(self, batch: Batch, row: int, owners: Tensor, candidates: Tensor) -> Values:
        """Return the answer's probability and rank, `[subset, 2]`, with the other candidates replaced."""
        generator = torch.Generator().manual_seed(seed_of(batch.rows[row], self.seed + 1))
        tokens, likelihoods = self._alternatives(batch, row)
        answer = int(batch.wanted()[0][row, 0])

        def values(kept: Tensor) -> Tensor:
            drawn = torch.multinomial(likelihoods, len(kept), replacement=True, generator=generator)
            replacements = tokens.gather(1, drawn).T.to(batch.ids.device)  # [subset, position]
            ids = batch.ids[row].expand(len(kept), -1).clone()
            removed = removed_positions(kept, owners, candidates)[:, : replacements.shape[1]]
            ids[:, : replacements.shape[1]][removed] = replacements[removed]
            readings = []
            for part in ids.split(self.rows):
                logits, _ = run(batch.decoder, part, batch.positions[row].repeat(len(part)))
                logits = logits.to(batch.decoder.dtype)
                ranks = 1 + (logits > logits[:, answer, None]).sum(1)
                readings.append(torch.stack([logits.softmax(-1)[:, answer], ranks.to(logits)], 1))
            return torch.cat(readings)

        return values

    def _alternatives(
        self, batch: Batch, row: int
    ) -> tuple[Int[Tensor, "position choice"], Float[Tensor, "position choice"]]:
        """Return the likeliest other tokens at each position, any at the first, with their likelihoods."""
        if batch.decoder.head.kind != "causal":
            raise DePassError(
                f"{self.name} replaces tokens by a language model's next tokens, and "
                f"{type(batch.decoder.model).__name__} predicts none; take occlusion or shapley"
            )
        ids, length = batch.ids[row], len(batch.rows[row])
        positions = torch.arange(length, device=ids.device)
        logits = batch.decoder.logits(ids[None, :length], positions)[0][0, :-1].to(batch.decoder.dtype)
        following = ids[1:length, None].to(logits.device)
        best = logits.scatter(1, following, -torch.inf).topk(min(CHOICES, logits.shape[1] - 1))
        generator = torch.Generator().manual_seed(seed_of(batch.rows[row], self.seed))
        size = len(batch.decoder.embedding)
        # One less than the vocabulary, shifted past the token itself.
        drawn = torch.randint(size - 1, (1, min(CHOICES, size - 1)), generator=generator)
        drawn = drawn + (drawn >= int(ids[0])).long()
        likelihoods = torch.cat(
            [torch.ones(drawn.shape, dtype=best.values.dtype), best.values.softmax(1).cpu()]
        )
        return torch.cat([drawn, best.indices.cpu()]), likelihoods
