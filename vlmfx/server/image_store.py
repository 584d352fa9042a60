"""ImageStore: the files of pictures that clients have sent to ask about later, each client's own."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from vlmfx.errors import EngineFull

ENTRY_BYTES = 4096  # what an image counts beside its file: itself and its names
MAX_NAMES = 8  # an image has at most, of a client's own choice; the oldest goes
MAX_NAME_CHARS = 256


@dataclass(kw_only=True, eq=False)
class StoredImage:
    """blob: the file as it was sent; width and height as it is shown; num_tokens: what it takes of a prompt by the server's settings.

    num_users: requests that are reading it."""

    id: str
    owner: bytes
    blob: bytes
    width: int
    height: int
    num_tokens: int
    created: float
    used: float
    names: list[str] = field(default_factory=list)
    num_users: int = 0
    is_gone: bool = False

    @property
    def size(self) -> int:
        return len(self.blob) + ENTRY_BYTES


class ImageStore:
    """Images by owner, at most max_bytes of all of them, each until nobody has used it for ttl_s.

    An id is a hash of the file under a secret of the process and its owner: it is the same for the same file, says nothing of it, and
    is of no use to others. Where there is no room, the image goes that was used longest ago, of the owner who has most, but none that a
    request is reading. All methods may be called from any thread. clock: seconds since 1970."""

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.time) -> None:
        self.max_bytes, self.ttl_s = max_bytes, ttl_s
        self.num_queries = self.num_hits = 0
        self._clock, self._secret, self._lock = clock, secrets.token_bytes(32), Lock()
        self._owned: Counter[bytes] = Counter()  # bytes by owner, of all that is kept and of what requests still read
        self._images: dict[bytes, dict[str, StoredImage]] = {}  # by owner; the one used last is the last
        self._named: dict[tuple[bytes, str], StoredImage] = {}

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return sum(map(len, self._images.values()))

    @property
    def num_bytes(self) -> int:
        """Of all that is kept, and of what requests still read."""
        with self._lock:
            self._expire()
            return self._owned.total()

    def takes(self, num_bytes: int) -> bool:
        """Whether a file of this size can be kept at all."""
        return num_bytes + ENTRY_BYTES <= self.max_bytes

    def put(
        self, owner: bytes, blob: bytes, *, width: int, height: int, num_tokens: int, name: str | None = None
    ) -> StoredImage:
        """The image of a file, under a name if there is one, which it takes from any other. Raises EngineFull, and drops nothing then."""
        digest = hashlib.blake2b(blob, key=self._secret, digest_size=16, person=owner[:16]).hexdigest()
        id = f"img-{digest}"
        with self._lock:
            now = self._expire()
            image = self._images.get(owner, {}).get(id)
            if image is None:
                image = StoredImage(
                    id=id, owner=owner, blob=blob, width=width, height=height, num_tokens=num_tokens, created=now, used=now
                )  # fmt: skip
                self._make_room(image)
                self._images.setdefault(owner, {})[id] = image
                self._owned[owner] += image.size
            self._touch(image, now)
            if name is not None:
                self._name(image, name)
            return image

    def find(self, owner: bytes, name: str, *, reads: bool = False) -> StoredImage | None:
        """An image by its id or one of its names, used now. reads: it is kept until `release`, and counted as asked for."""
        with self._lock:
            now = self._expire()
            image = self._known(owner, name)
            if reads:
                self.num_queries += 1
                self.num_hits += image is not None
            if image is not None:
                self._touch(image, now)
                image.num_users += reads
            return image

    def release(self, image: StoredImage) -> None:
        """What `find` gave has been read."""
        with self._lock:
            image.num_users -= 1
            self._free(image)

    def delete(self, owner: bytes, name: str) -> StoredImage | None:
        """The image that is there no more; None where it was not."""
        with self._lock:
            self._expire()
            image = self._known(owner, name)
            if image is not None:
                self._drop(image)
            return image

    def _known(self, owner: bytes, name: str) -> StoredImage | None:
        """By its id, or one of its names."""
        return self._images.get(owner, {}).get(name) or self._named.get((owner, name))

    def _expire(self) -> float:
        now = self._clock()
        for images in list(self._images.values()):
            for image in list(images.values()):
                if now - image.used < self.ttl_s:
                    break
                self._drop(image)
        return now

    def _touch(self, image: StoredImage, now: float) -> None:
        images = self._images[image.owner]
        images[image.id] = images.pop(image.id)
        image.used = now

    def _name(self, image: StoredImage, name: str) -> None:
        before = self._named.get((image.owner, name))
        if before is not None:
            before.names.remove(name)
        self._named[image.owner, name] = image
        image.names.append(name)
        if len(image.names) > MAX_NAMES:
            del self._named[image.owner, image.names.pop(0)]

    def _make_room(self, image: StoredImage) -> None:
        owned = self._owned + Counter({image.owner: image.size})
        unread = {key: (one for one in images.values() if not one.num_users) for key, images in self._images.items()}
        going: list[StoredImage] = []  # all are chosen before any goes
        while owned.total() > self.max_bytes:
            for owner, _ in owned.most_common():
                one = next(unread.get(owner, iter(())), None)
                if one is not None:
                    going.append(one)
                    owned[owner] -= one.size
                    break
            else:
                message = "there is no room for the image now, as others are being read; send it again in a while."
                raise EngineFull(message)
        for one in going:
            self._drop(one)

    def _drop(self, image: StoredImage) -> None:
        images = self._images[image.owner]
        del images[image.id]
        if not images:
            del self._images[image.owner]
        for name in image.names:
            del self._named[image.owner, name]
        image.is_gone = True
        self._free(image)

    def _free(self, image: StoredImage) -> None:
        """Count an image no more, if it is gone and nobody reads it."""
        if image.is_gone and not image.num_users:
            self._owned[image.owner] -= image.size
            if not self._owned[image.owner]:
                del self._owned[image.owner]
