"""What a cgroup says of a process: the texts are those that the kernel shows under these engines."""

from __future__ import annotations

import pytest

from madsci_registry.cgroups import Place, place_of

ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("cgroup", "place"),
    [
        (f"0::/system.slice/docker-{ID}.scope\n", Place(None, ID, f"docker stop {ID[:12]}")),
        (f"4:memory:/docker/{ID}\n1:name=systemd:/docker/{ID}\n", Place(None, ID, f"docker stop {ID[:12]}")),
        (f"0::/machine.slice/libpod-{ID}.scope/container\n", Place(None, ID, f"podman stop {ID[:12]}")),
        (
            f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope\n",
            Place(None, ID, f"crictl stop {ID[:12]}"),
        ),
        (f"2:cpu:/kubepods/besteffort/pod1-2/{ID}\n", Place(None, ID, f"crictl stop {ID[:12]}")),
        (f"0::/../{ID}\n", Place(None, ID, None)),
        ("0::/lxc.payload.lab/system.slice/node.service\n", Place(None, "lab", None)),
        ("0::/machine.slice/machine-lab.scope/payload\n", Place(None, "lab", "machinectl stop lab")),
        (
            "0::/system.slice/machine-controller.service\n",
            Place("machine-controller.service", None, "systemctl stop machine-controller.service"),
        ),
        ("0::/system.slice/node.service\n", Place("node.service", None, "systemctl stop node.service")),
        (
            "0::/user.slice/user-1.slice/user@1.service/app.slice/node.service\n",
            Place("node.service", None, "systemctl --user stop node.service"),
        ),
        ("0::/user.slice/user-1.slice/session-2.scope\n", Place("session-2.scope")),
        ("0::/\n", Place()),
        ("", Place()),
        ("nonsense\n7\n", Place()),
    ],
)
def test_place_of_a_cgroup_names_container_or_unit_and_what_stops_it(cgroup: str, place: Place) -> None:
    """A container is told with its engine's stop command, else the innermost unit; a scope is not stopped, since it
    may hold a whole login."""
    assert place_of(cgroup) == place
