#!/usr/bin/python
"""Folders and text files of a host, all at once: one module run where ansible.builtin would need one or two for each file."""

from __future__ import annotations

DOCUMENTATION = r"""
module: tree
short_description: Folders and text files, all at once
description:
  - Makes folders and writes text files, each with its owner and mode, and removes what is to be gone.
  - A file is never there with a part of its content, or open to more users than in the end.
  - Links are followed only in folders that root alone may write. Elsewhere, and in the place of a folder, a link is refused, because
    another user may have put it there to have root change what it leads to.
  - For settings, units and the like. It shows what it writes (diff mode), so it is not for secrets.
author: The SecFuNet authors
options:
  folders:
    description: Folders, each after its parent.
    type: list
    elements: dict
    default: []
    options: &attributes
      path: {description: Where., type: path, required: true}
      owner: {description: User., type: str, default: root}
      group: {description: Group., type: str, default: root}
      mode: {description: Permissions., type: str, required: true}
  files:
    description: Text files.
    type: list
    elements: dict
    default: []
    options:
      <<: *attributes
      content: {description: The whole of it., type: str, required: true}
  links:
    description: Symbolic links.
    type: list
    elements: dict
    default: []
    options:
      path: {description: Where., type: path, required: true}
      target: {description: What it leads to., type: str, required: true}
  instances:
    description: Folders and files with C(%i) in their path are made for each of these names, which takes its place, in the content, too.
    type: list
    elements: str
    default: []
  absent:
    description: Files that are not to be there.
    type: list
    elements: path
    default: []
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
"""

EXAMPLES = r"""
- name: Write the settings
  tree:
    folders:
      - {path: /etc/secfunet, mode: "0755"}
    files:
      - path: /etc/secfunet/gose.toml
        mode: "0640"
        content: "{{ lookup('ansible.builtin.template', 'gose.toml.j2') }}"
"""

RETURN = r"""
paths:
  description: What was changed, or would be.
  type: list
  returned: always
"""

import contextlib
import errno
import grp
import os
import pwd
import stat

from ansible.module_utils.basic import AnsibleModule

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
ATTRIBUTES = {
    "path": {"type": "path", "required": True},
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
    "mode": {"type": "str", "required": True},
}


def for_each(items, instances):
    """The items, those with %i in their path once for each instance."""
    for item in items:
        if "%i" in item["path"]:
            for name in instances:
                yield {key: value.replace("%i", name) for key, value in item.items()}
        else:
            yield item


def number_of(database, name, module):
    """A user's or group's number; None in check mode if it would be made first."""
    try:
        return database(name)[2]
    except KeyError:
        if module.check_mode:
            return None
        module.fail_json(msg=f"there is no user or group {name}")


def open_folder(path):
    """A descriptor of the folder C(path). A link on the way is followed only where nobody but root could have put it. Raises OSError."""
    waiting = [name for name in path.split("/") if name not in ("", ".")][::-1]
    here = os.open("/", FOLDER)
    followed = 0
    try:
        while waiting:
            name = waiting.pop()
            found = os.stat(name, dir_fd=here, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                followed += 1
                refuse_link(here, path, followed)
                target = os.readlink(name, dir_fd=here)
                waiting += [part for part in target.split("/") if part not in ("", ".")][::-1]
                if not target.startswith("/"):
                    continue
                name = "/"
            inner = os.open(name, FOLDER, dir_fd=here)
            os.close(here)
            here = inner
        return here
    except BaseException:
        os.close(here)
        raise


def refuse_link(folder, path, followed):
    """Raises OSError unless root alone may write C(folder), in which a link was met on the way to C(path)."""
    found = os.fstat(folder)
    if followed > 40:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise OSError(errno.ELOOP, "a link on the way to it lies in a folder that others than root may write", path)


@contextlib.contextmanager
def parent_of(path):
    """The folder that C(path) lies in, as a descriptor, and its name there. Raises OSError."""
    above, name = os.path.split(path.rstrip("/"))
    folder = open_folder(above or "/")
    try:
        yield folder, name
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(folder)


def found_at(path):
    """What lies at C(path), itself and not what it leads to; None if there is nothing."""
    try:
        with parent_of(path) as (folder, name):
            return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def wrong_attributes(item, module):
    """What of owner, group and mode is not as it should be."""
    found = found_at(item["path"])
    if found is None:
        return ["missing"]
    if stat.S_ISLNK(found.st_mode):
        return ["a link"]
    wanted = {
        "owner": (number_of(pwd.getpwnam, item["owner"], module), found.st_uid),
        "group": (number_of(grp.getgrnam, item["group"], module), found.st_gid),
        "mode": (int(item["mode"], 8), found.st_mode & 0o7777),
    }
    return [name for name, (should, is_) in wanted.items() if should != is_]


def set_attributes(descriptor, item, module):
    """Mode last: whoever is not to read it never can."""
    uid = number_of(pwd.getpwnam, item["owner"], module)
    gid = number_of(grp.getgrnam, item["group"], module)
    os.fchown(descriptor, uid, gid)
    os.fchmod(descriptor, int(item["mode"], 8))


def make_folder(item, module):
    """A link in its place is refused (O_NOFOLLOW)."""
    with parent_of(item["path"]) as (above, name):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=above)
        if stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, "a link is in the place of this folder; remove it, if it is yours")
        folder = os.open(name, FOLDER, dir_fd=above)
        try:
            set_attributes(folder, item, module)
        finally:
            os.close(folder)


def write_file(item, module):
    """A link in its place is replaced, as any file is; what it leads to stays as it is."""
    with parent_of(item["path"]) as (folder, name):
        unfinished = f".tree-{os.urandom(8).hex()}"
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(item["content"])
                file.flush()
                os.fsync(file.fileno())
                set_attributes(file.fileno(), item, module)
            os.replace(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(unfinished, dir_fd=folder)
            raise


def target_of(path):
    """Where a link leads; empty if it is none."""
    try:
        with parent_of(path) as (folder, name):
            return os.readlink(name, dir_fd=folder)
    except OSError:
        return ""


def make_link(item):
    """The old one leads where it led until the new one is there."""
    with parent_of(item["path"]) as (folder, name):
        unfinished = f".tree-{os.urandom(8).hex()}"
        os.symlink(item["target"], unfinished, dir_fd=folder)
        os.replace(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)


def remove(path):
    with parent_of(path) as (folder, name):
        os.unlink(name, dir_fd=folder)


def content_of(path):
    """The text of a file; empty if there is none, or something else."""
    found = found_at(path)
    if found is None or not stat.S_ISREG(found.st_mode):
        return ""
    with parent_of(path) as (folder, name):
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        return file.read()


def difference(path, before, after):
    return {"before_header": path, "after_header": path, "before": before, "after": after}


def main():
    module = AnsibleModule(
        argument_spec={
            "folders": {"type": "list", "elements": "dict", "default": [], "options": ATTRIBUTES},
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {**ATTRIBUTES, "content": {"type": "str", "required": True}},
            },
            "links": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"path": ATTRIBUTES["path"], "target": {"type": "str", "required": True}},
            },
            "instances": {"type": "list", "elements": "str", "default": []},
            "absent": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    paths, differences = [], []
    try:
        instances = module.params["instances"]
        for item in for_each(module.params["folders"], instances):
            wrong = wrong_attributes(item, module)
            if wrong:
                paths.append(item["path"])
                differences.append(difference(item["path"], "", f"folder: {', '.join(wrong)}\n"))
                if not module.check_mode:
                    make_folder(item, module)
        for item in for_each(module.params["files"], instances):
            wrong = wrong_attributes(item, module)
            before = content_of(item["path"])
            if wrong or before != item["content"]:
                paths.append(item["path"])
                differences.append(difference(item["path"], before, item["content"]))
                if not module.check_mode:
                    write_file(item, module)
        for item in module.params["links"]:
            before = target_of(item["path"])
            if before != item["target"]:
                paths.append(item["path"])
                differences.append(difference(item["path"], f"{before}\n", f"{item['target']}\n"))
                if not module.check_mode:
                    make_link(item)
        for path in module.params["absent"]:
            if found_at(path) is not None:
                paths.append(path)
                differences.append(difference(path, content_of(path), ""))
                if not module.check_mode:
                    remove(path)
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'a file'}: {error.strerror}", paths=paths)
    module.exit_json(changed=bool(paths), paths=paths, diff=differences)


if __name__ == "__main__":
    main()
