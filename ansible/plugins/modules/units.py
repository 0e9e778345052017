#!/usr/bin/python
"""Services of a host, all at once: enabled, started, and restarted if what they run with is new."""

from __future__ import annotations

DOCUMENTATION = r"""
module: units
short_description: Services, all at once
description:
  - Enables and starts units of systemd. One that runs is restarted if what it runs with is new, and one that is started now is not
    restarted after that.
  - Check mode says what would be done to units that are not there yet, too.
author: The SecFuNet authors
options:
  names: {description: The units., type: list, elements: str, required: true}
  state: {description: What they are to be., type: str, choices: [started, stopped], default: started}
  renewed: {description: What they run with is new., type: bool, default: false}
  reload: {description: What they read again at a reload is new; worth nothing with O(renewed)., type: bool, default: false}
attributes:
  check_mode: {support: full}
"""

EXAMPLES = r"""
- name: Start the grid
  units:
    names: [gose.service]
    renewed: "{{ settings is changed }}"
"""

RETURN = r"""
actions:
  description: What was done, or would be.
  type: list
  returned: always
"""

from ansible.module_utils.basic import AnsibleModule

WANTED = "Id,LoadState,ActiveState,UnitFileState,NeedDaemonReload"
RUNNING = ("active", "activating", "reloading")


def states(module, names):
    """What systemd says of each unit."""
    _, out, _ = module.run_command(["systemctl", "show", f"--property={WANTED}", "--", *names], check_rc=True)
    return [dict(line.split("=", 1) for line in block.splitlines()) for block in out.strip().split("\n\n")]


def main():
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "renewed": {"type": "bool", "default": False},
            "reload": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    names, actions = module.params["names"], []

    def act(verb, chosen):
        if not chosen:
            return
        actions.append([verb, *chosen])
        if not module.check_mode:
            code, _, error = module.run_command(["systemctl", verb, "--", *chosen])
            if code:
                _, log, _ = module.run_command(
                    ["journalctl", "-n", "15", "-o", "cat", *(f"-u{name}" for name in chosen)]
                )
                module.fail_json(
                    msg=f"systemctl {verb} {' '.join(chosen)}: {error.strip()}\n{log.strip()}", actions=actions
                )

    if not module.check_mode and (
        module.params["renewed"] or any(one["NeedDaemonReload"] == "yes" for one in states(module, names))
    ):
        module.run_command(["systemctl", "daemon-reload"], check_rc=True)
    found = dict(zip(names, states(module, names), strict=True))
    running = [name for name in names if found[name]["ActiveState"] in RUNNING]
    enabled = [name for name in names if found[name]["UnitFileState"] == "enabled"]
    if module.params["state"] == "started":
        act("enable", [name for name in names if name not in enabled])
        if module.params["renewed"]:
            act("restart", running)
        elif module.params["reload"]:
            act("reload", running)
        act("start", [name for name in names if name not in running])
    else:
        act("stop", running)
        act("disable", enabled)
    module.exit_json(changed=bool(actions), actions=actions)


if __name__ == "__main__":
    main()
