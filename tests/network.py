"""NetworkPolicies, evaluated: may this one talk to that one?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from manifests import Object, selects


@dataclass(frozen=True)
class Pod:
    namespace: str
    labels: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)  # by name


@dataclass(frozen=True)
class Outside:
    """An address that no pod has."""

    ip: str


Peer = Pod | Outside


def allowed(policies: Sequence[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Both sides have a word: the source's egress and the target's ingress."""
    ways = (("Egress", source, target), ("Ingress", target, source))
    return all(_passes(policies, way, own, other, target, port, protocol) for way, own, other in ways)


def _passes(
    policies: Sequence[Object], way: str, own: Peer, other: Peer, target: Peer, port: int, protocol: str
) -> bool:
    if isinstance(own, Outside):
        return True
    mine = [
        one["spec"]
        for one in policies
        if one["metadata"]["namespace"] == own.namespace
        and selects(one["spec"]["podSelector"], own.labels)
        # The types by default: ingress, and egress where a rule says so.
        and way in one["spec"].get("policyTypes", ["Ingress", *(["Egress"] if "egress" in one["spec"] else [])])
    ]
    if not mine:
        return True
    rules = [rule for spec in mine for rule in spec.get(way.lower(), [])]
    side = "to" if way == "Egress" else "from"
    return any(
        (not rule.get(side) or any(_is(peer, other, own.namespace) for peer in rule[side]))
        and (not rule.get("ports") or any(_port(one, target, port, protocol) for one in rule["ports"]))
        for rule in rules
    )


def _is(peer: Object, other: Peer, namespace: str) -> bool:
    if block := peer.get("ipBlock"):
        return (
            isinstance(other, Outside)
            and ip_address(other.ip) in ip_network(block["cidr"])
            and not any(ip_address(other.ip) in ip_network(cidr) for cidr in block.get("except", []))
        )
    if not isinstance(other, Pod):
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif other.namespace != namespace:
        return False
    return "podSelector" not in peer or selects(peer["podSelector"], other.labels)


def _port(one: Object, target: Peer, port: int, protocol: str) -> bool:
    if one.get("protocol", "TCP") != protocol:
        return False
    wanted = one.get("port")
    if isinstance(wanted, str):
        wanted = target.ports.get(wanted) if isinstance(target, Pod) else None
        return wanted == port
    return wanted is None or wanted <= port <= one.get("endPort", wanted)
