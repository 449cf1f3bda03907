"""`python analyze.py serve=true`: a page on this machine to ask the model about any prompt."""

import importlib.util
import json
import secrets
import socket
import webbrowser
from collections.abc import Callable
from urllib.parse import quote, urlencode

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from depass_lightning.commands.ask import AskedModel
from depass_lightning.commands.shell import first_process, print_stderr
from depass_lightning.depass import DePass
from depass_lightning.errors import DePassError

LOOPBACK = "127.0.0.1"
GRACE = 2  # seconds that a running request gets after Ctrl-C


def serve(config: DictConfig, load: Callable[[DictConfig], DePass], console: Console) -> int:
    """Serve the ask page on the loopback interface until Ctrl-C, and return the exit code.

    Args:
        config: the configuration; `model`, `trainer` (its device), `task.rows` and `open` are used.
        load: loads the model that a configuration names.
        console: prints the address.

    Raises:
        DePassError: starlette or uvicorn is missing, or the model cannot be asked.
    """
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise DePassError(
            f"serve=true needs {' and '.join(missing)}; install the extra: "
            "pip install 'depass-lightning[serve]'"
        )
    if not first_process():
        return 0
    import uvicorn

    from depass_lightning.commands.ask_app import ask_app

    depass = load(config)
    if not depass.decoder.placed:
        depass.model.to(instantiate(config.trainer, logger=False).strategy.root_device)
    answers = AskedModel(depass, config.model.name)
    token = secrets.token_urlsafe(24)
    with socket.socket() as bound:
        bound.bind((LOOPBACK, 0))
        port = bound.getsockname()[1]
        address = f"http://{LOOPBACK}:{port}/?token={token}{fragment(config)}"
        console.print(Text(f"ask      {address}\nCtrl-C ends it"), soft_wrap=True)
        if config.open and not webbrowser.open(address):
            print_stderr("there is no browser to open the page; open the address above", "yellow")
        settings = uvicorn.Config(
            ask_app(answers, token, port),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=GRACE,
        )
        uvicorn.Server(settings).run(sockets=[bound])
    return 0


def fragment(config: DictConfig) -> str:
    """Return the address's part for the prompt of the command line, if there is one.

    Args:
        config: the configuration.
    """
    rows = OmegaConf.to_container(config.task.get("rows") or OmegaConf.create([]))
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        return ""
    names = ("prompt", "messages", "target", "foil")
    fields = {name: rows[0][name] for name in names if rows[0].get(name) is not None}
    written = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in fields.items()
    }
    return "#" + urlencode(written, quote_via=quote)
