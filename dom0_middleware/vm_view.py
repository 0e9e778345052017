"""A VM as orchestrators see it."""

from __future__ import annotations

from dom0_middleware.channels.port import ChannelState, ChannelStatus
from dom0_middleware.guest import GuestDomain, Phase
from dom0_middleware.hypervisor import DomainInfo, DomainState
from dom0_middleware.state import VmRecord
from dom0_middleware.tokens import ends_soon
from dom0_middleware.vm_definition import bound
from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.vm_auth_token import unverified_expiry

_STATES = {
    DomainState.STOPPED: pb.VM_STATE_STOPPED,
    DomainState.RUNNING: pb.VM_STATE_RUNNING,
    DomainState.PAUSED: pb.VM_STATE_PAUSED,
}


def describe(
    record: VmRecord, info: DomainInfo | None, guest: GuestDomain | None, channel: ChannelStatus, *, now: float
) -> pb.Vm:
    """``info``: what the hypervisor says of its domain; ``guest``: its run, and ``channel`` that one's channel."""
    runs = guest is not None and guest.phase is not Phase.ENDED
    if info is not None and bound(record, info):
        state = _STATES[info.state]
    else:
        state = pb.VM_STATE_AWAY if record.arriving else pb.VM_STATE_STOPPED
    return pb.Vm(
        uuid=record.uuid,
        name=record.name,
        state=state,
        vmid=record.vmid,
        enrolled=guest is not None and runs and guest.enrolled,
        agent_connected=guest is not None and runs and guest.presence.connected,
        agent_since=int(guest.presence.since) if guest is not None and runs else 0,
        channel_refused=channel.why if channel.state is ChannelState.REFUSED else "",
        token_ends_soon=not record.revoked and ends_soon(record.vm_auth_token, now),
        revoked=record.revoked,
        authorised_until=unverified_expiry(record.vm_auth_token) if record.vm_auth_token else 0,
    )
