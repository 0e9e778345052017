"""Would an agent with these settings work? Asked by ``vm-agent check``, before it is started and beside a running one."""

from __future__ import annotations

import grp
import os
import time
from collections.abc import Iterator
from pathlib import Path

from secfunet.errors import SecFuNetError
from secfunet.service.findings import Finding, Weight
from secfunet.service.lock import LockHeldError, process_lock
from secfunet.service.tables import moment
from vm_agent.enrolment import EnrolmentStore
from vm_agent.join_source import join_source
from vm_agent.settings import AgentSettings


def look(settings: AgentSettings) -> list[Finding]:
    """Settings, folders, group, and what dom0 has handed over."""
    return [*_folders(settings), *_group(settings), *_identity(settings)]


def _folders(settings: AgentSettings) -> Iterator[Finding]:
    for key, folder in (("state", settings.state), ("socket", settings.socket.parent)):
        there = _existing(folder)
        if not there.is_dir():
            yield Finding(key, Weight.WRONG, f"{there} is not a folder")
        elif not os.access(there, os.W_OK | os.X_OK):
            yield Finding(key, Weight.WRONG, f"this user may not write into {there}")
        else:
            yield Finding(key, message=str(folder))
    lock = settings.state / "lock"
    if lock.exists():
        try:
            with process_lock(lock):
                yield Finding("agent", message="not running")
        except LockHeldError:
            yield Finding("agent", message="running: 'vm-agent status' says whether an operation would work")
        except OSError as error:
            yield Finding("state", Weight.WRONG, str(error))


def _existing(folder: Path) -> Path:
    """The folder, or the first one above it that is there: 'serve' makes what is missing."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _group(settings: AgentSettings) -> Iterator[Finding]:
    if settings.group is None:
        return
    try:
        number = grp.getgrnam(settings.group).gr_gid
    except KeyError:
        yield Finding("group", Weight.WRONG, f"there is no group '{settings.group}'")
        return
    if os.geteuid() != 0 and number not in {os.getegid(), *os.getgroups()}:
        yield Finding("group", Weight.WRONG, f"this user is not in '{settings.group}', and may not give it the socket")
    else:
        yield Finding("group", message=settings.group)


def _identity(settings: AgentSettings) -> Iterator[Finding]:
    try:
        kept = EnrolmentStore(settings.state).load()
    except (SecFuNetError, OSError) as error:
        kept = None
        yield Finding("enrolment", Weight.WARNING, f"what is on file cannot be used: {error}")
    if kept is not None:
        end = kept.expires_at
        if end > time.time():
            yield Finding("enrolment", message=f"on file, until {moment(end)}")
        else:
            yield Finding(
                "enrolment", Weight.WARNING, f"on file, its certificate ended at {moment(end)}: dom0 may renew it"
            )
    source = join_source(settings.join, settings.state)
    try:
        invited = source.read()
    except (SecFuNetError, OSError) as error:
        yield Finding("join", Weight.WRONG, f"{source.where}: {error}")
        return
    if invited is not None:
        yield Finding("join", message=f"dom0 has invited this VM ({source.where})")
    elif kept is None:
        yield Finding("join", Weight.AWAY, f"nothing from dom0 in {source.where} yet: it comes with 'vm start'")
