"""Which W&B server is meant and where its key is, without importing wandb."""

import configparser
import logging
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

log = logging.getLogger(__name__)


def credentials() -> str | None:
    """Where an API key for the configured server is found, in words; None: nowhere."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return f"${name}"
    home = Path.home()
    default = home / ("_netrc" if (home / "_netrc").exists() else ".netrc")
    path = Path(os.environ.get("NETRC") or default).expanduser()
    try:
        found = netrc.netrc(path).authenticators(urlsplit(server()).netloc)
    except FileNotFoundError:
        return None
    except (netrc.NetrcParseError, OSError) as error:
        log.warning("cannot read %s: %s", path, error)
        return None
    return str(path) if found else None


def server() -> str:
    """The address of the W&B server: $WANDB_BASE_URL, wandb's settings, or the public one."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    folder = os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb"
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(Path(folder) / "settings")
    except (configparser.Error, OSError) as error:
        log.warning("cannot read wandb's settings in %s: %s", folder, error)
    return settings.get("default", "base_url", fallback="https://api.wandb.ai")
