"""ServerOptions: where a server listens, whom it lets in, and how much it takes. Plain Python: the command line imports it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal

from vlmfx.errors import InvalidRequest, shown

MEDIA_LIMITS = {"image": 64, "video": 8}  # of a prompt, where --limit-mm-per-prompt does not say
MAX_IMAGE_PIXELS = 178_956_970  # that of vlmfx.processing.images, which is not imported here
KEY_VARIABLES = ("VLMFX_API_KEY", "VLLM_API_KEY")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """names: what clients may call the model, the first of them in answers. host None is every address of the machine, as in vLLM.

    allowed_hosts: what the Host header may say beside localhost, host and addresses, "*" for anything; where it is empty any is taken,
    unless the server has no key and listens at a loopback address. api_keys: one of them must come with a request; none lets everybody
    in. page: whether there is one at / to try the model on. max_connections: that are open at once; header_timeout_s: for the headers of
    a request to come, 0 for no limit. max_waiting: requests that wait for the engine, beyond those that run; also of what needs no
    engine, and of what fetches. max_body_bytes: of a request; max_held_bytes: of the bodies of all requests that are being served; a
    body must be there within body_timeout_s. max_image_pixels: of one image or frame. request_timeout_s: from a request's first byte to
    its end; None is no limit. drain_timeout_s: what runs at SIGTERM may take so long to end. max_image_store_bytes: of images that are
    kept for later requests, 0 for none; image_ttl_s: how long one is kept that nobody uses. Raises InvalidRequest."""

    names: tuple[str, ...]
    host: str | None = None
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    trust_request_chat_template: bool = False
    page: bool = True
    max_connections: int = 1024
    header_timeout_s: float = 30.0
    max_waiting: int = 1024
    max_body_bytes: int = 64 * 2**20
    max_held_bytes: int = 512 * 2**20
    body_timeout_s: float = 60.0
    request_timeout_s: float | None = None
    drain_timeout_s: float = 30.0
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_image_store_bytes: int = 256 * 2**20
    image_ttl_s: float = 3600.0
    metrics_prefix: Literal["vlmfx", "vllm"] = "vlmfx"
    log_format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("port", 0, 65535),
            ("max_connections", 1, None),
            ("max_waiting", 0, None),
            ("max_body_bytes", 1, None),
            ("max_image_pixels", 1, MAX_IMAGE_PIXELS),
            ("max_image_store_bytes", 0, None),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least or (most is not None and value > most):
                span = f"{least} or more" if most is None else f"{least} to {most}"
                raise InvalidRequest(name, f"it is {shown(value)}; use a whole number of {span}.", found=value)
        for name in ("header_timeout_s", "body_timeout_s", "request_timeout_s", "drain_timeout_s", "image_ttl_s"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1e9):
                raise InvalidRequest(name, f"it is {shown(value)}; use a number of seconds.", found=value)
        if not self.names or not all(self.names):
            raise InvalidRequest("served_model_name", "it is empty; give at least one name.")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise InvalidRequest("ssl_keyfile", "TLS needs ssl_keyfile and ssl_certfile; give both, or neither.")
        for name in ("ssl_keyfile", "ssl_certfile"):
            path = getattr(self, name)
            if path and not os.path.isfile(path):
                raise InvalidRequest(name, f"{path!r} is not a file; give the path of a PEM file.", found=path)
        if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in self.api_keys):
            message = (
                "one of the keys is empty, or holds a space at an end or what HTTP cannot carry; use plain characters."
            )
            raise InvalidRequest("api_key", message)
        for name in self.allowed_hosts:
            if not name or set(name) & set("/:[] "):
                message = f"it holds {shown(name)}; give names alone, as example.com, without scheme, port or brackets."
                raise InvalidRequest("allowed_hosts", message, found=name)
        if self.root_path and not self.root_path.startswith("/"):
            raise InvalidRequest("root_path", f"it is {self.root_path!r}; begin it with a slash.", found=self.root_path)

    @property
    def is_loopback(self) -> bool:
        """Whether host is an address of the machine for itself alone."""
        with suppress(ValueError):
            return ip_address(self.host or "").is_loopback
        return self.host == "localhost"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.uds is not None or self.is_loopback


def keys_of(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of the command line and of the environment, each once."""
    found = [*given, *(environment[name] for name in KEY_VARIABLES if name in environment)]
    return tuple(dict.fromkeys(found))


def names_of(value: Any, option: str) -> tuple[str, ...]:
    """An option that is a JSON list of strings, as vLLM's of CORS are. Raises InvalidRequest."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        message = f"""it is {shown(value)}; give a JSON list of strings, as in '["https://example.com"]'."""
        raise InvalidRequest(option, message, found=value)
    return tuple(value)
