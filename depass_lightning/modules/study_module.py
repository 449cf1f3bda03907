"""An experiment as a LightningModule for `Trainer.predict`, which starts and places the processes."""

from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import LightningModule
from typing_extensions import override

from depass_lightning.depass import DePass
from depass_lightning.studies.study_result import StudyResult
from depass_lightning.utils.distributed import sharing


class Study(Protocol):
    """What `depass_lightning.studies` has one of for each of the paper's experiments."""

    def run(self, depass: DePass, folder: str | Path, *, progress: bool = False) -> StudyResult:
        """Run the experiment and write it into a folder.

        Args:
            depass: the model, with its tokenizer.
            folder: where to write.
            progress: show progress bars.
        """
        ...


class StudyModule(LightningModule):
    """Run an experiment in the one step of a prediction; all processes share its prompts."""

    def __init__(self, study: Study, depass: DePass, folder: Path) -> None:
        super().__init__()
        self.study = study
        self.depass = depass
        self.folder = folder
        self.model = None if depass.decoder.placed else depass.model  # what Lightning moves to the device

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0) -> bool:
        """Run the experiment."""
        with sharing():
            self.study.run(self.depass, self.folder, progress=self.trainer.is_global_zero)
        return True  # Lightning warns of a step that returns nothing
