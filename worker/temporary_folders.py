"""Temporary folders of videos: what they are called, and the removal of those that a killed process left."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

#: How the folders begin that a video is encoded in.
VIDEO_PREFIX: Final = "latentq-video-"
#: No clip is encoded for as long as this.
_ABANDONED_S: Final = 86_400.0


def remove_abandoned() -> int:
    """Removes folders of this user in which nothing was written for a day. Returns how many.

    Safe beside workers that use theirs, and beside another that removes the same.
    """
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{VIDEO_PREFIX}*"):
        try:
            if _is_abandoned(folder):
                shutil.rmtree(folder)
                removed += 1
        except FileNotFoundError:  # another worker was faster
            continue
        except OSError as error:
            logger.warning("%s stays: %s", folder, error, extra={"action": "temporary_kept"})
    if removed:
        logger.info("removed %d folders of killed workers", removed, extra={"action": "temporary_removed"})
    return removed


def _is_abandoned(folder: Path) -> bool:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return False
    newest_s = max((item.lstat().st_mtime for item in folder.iterdir()), default=found.st_mtime)
    return time.time() - max(newest_s, found.st_mtime) > _ABANDONED_S
