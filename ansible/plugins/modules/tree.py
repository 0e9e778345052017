#!/usr/bin/python
"""Folders and text files of a host, all at once: one module run where ansible.builtin would need one or two for each file."""

from __future__ import annotations

DOCUMENTATION = r"""
module: tree
short_description: Folders and text files, all at once
description:
  - Makes folders and writes text files, each with its owner and mode, and removes what is to be gone.
  - A file is never there with a part of its content, or open to more users than in the end.
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

import grp
import os
import pwd
import tempfile

from ansible.module_utils.basic import AnsibleModule

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


def wrong_attributes(item, module):
    """What of owner, group and mode is not as it should be."""
    try:
        found = os.stat(item["path"], follow_symlinks=False)
    except FileNotFoundError:
        return ["missing"]
    wanted = {
        "owner": (number_of(pwd.getpwnam, item["owner"], module), found.st_uid),
        "group": (number_of(grp.getgrnam, item["group"], module), found.st_gid),
        "mode": (int(item["mode"], 8), found.st_mode & 0o7777),
    }
    return [name for name, (should, is_) in wanted.items() if should != is_]


def set_attributes(target, item, module):
    """Mode last: whoever is not to read it never can."""
    uid = number_of(pwd.getpwnam, item["owner"], module)
    gid = number_of(grp.getgrnam, item["group"], module)
    os.chown(target, uid, gid, follow_symlinks=False)
    os.chmod(target, int(item["mode"], 8))


def make_folder(item, module):
    if not os.path.isdir(item["path"]):
        os.mkdir(item["path"], 0o700)
    set_attributes(item["path"], item, module)


def write_file(item, module):
    handle, unfinished = tempfile.mkstemp(dir=os.path.dirname(item["path"]), prefix=".tree-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(item["content"])
            file.flush()
            os.fsync(file.fileno())
        set_attributes(unfinished, item, module)
        os.replace(unfinished, item["path"])
    except BaseException:
        os.unlink(unfinished)
        raise


def target_of(path):
    """Where a link leads; empty if it is none."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def make_link(item):
    """The old one leads where it led until the new one is there."""
    unfinished = f"{item['path']}.new"
    if os.path.lexists(unfinished):
        os.unlink(unfinished)
    os.symlink(item["target"], unfinished)
    os.replace(unfinished, item["path"])


def content_of(path):
    """The text of a file; empty if there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


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
            if os.path.lexists(path):
                paths.append(path)
                differences.append(difference(path, content_of(path), ""))
                if not module.check_mode:
                    os.unlink(path)
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'a file'}: {error.strerror}", paths=paths)
    module.exit_json(changed=bool(paths), paths=paths, diff=differences)


if __name__ == "__main__":
    main()
