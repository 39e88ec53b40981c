# SPDX-License-Identifier: MPL-2.0
"""Makes a Plan, with everything needed to start a task, from its configuration and what was found on the host."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nspawn.accounts import Account
from nspawn.bundle import (
    DEFAULT_PATH,
    ExecContext,
    explain_variables,
    plan_exec_context,
    render_bundle,
    select_variables,
)
from nspawn.cdi import Hook
from nspawn.cgroup import plan_cgroup, plan_limits
from nspawn.checks import check_container_path, check_user, escape_field
from nspawn.common import ConfigError
from nspawn.devices import USUAL_DEVICES, DeviceRule
from nspawn.host import CgroupMode, Host, Mounts
from nspawn.images import Image
from nspawn.job import UUID, GroupNetwork, JobOptions, Mode, TaskConfig, plan_machine, state_directory
from nspawn.mounts import Device, Mount
from nspawn.network import NetworkInputs, NetworkPlan, plan_network
from nspawn.options import Option, decode_string
from nspawn.permissions import Size
from nspawn.roots import PrivateRoot, RootPlan, plan_root, plan_upper_dir
from nspawn.rules import check_rules
from nspawn.sources import Source, StagedSource
from nspawn.unit import plan_unit_environ, plan_unit_mounts
from nspawn.view import View, is_foreign

OWN_MOUNTS = ("/dev", "/proc", "/run", "/sys", "/tmp")  # what nspawn mounts over the image's own directories


@dataclass(frozen=True)
class Plan:
    """Everything needed to start a task."""

    task_id: str
    machine: str
    options: JobOptions  # with all that the image, the network and the task add
    network: NetworkPlan
    program: tuple[str, ...]  # systemd-nspawn with the machine's name, and what starts it
    argv: tuple[str, ...]  # its further arguments, but for those of a private root, which come first
    environ: Mapping[str, str]  # variables for nspawn beside the usual ones
    bundle: str  # the text of config.json
    cgroup: str
    limits: Mapping[str, str]  # contents of the cgroup's control files, by name
    log_paths: tuple[str, str]  # of stdout and stderr
    image: Image
    private: PrivateRoot | None  # None: nspawn makes the root from the image
    search_path: str  # the command's PATH
    mounts: tuple[Mount, ...]  # with their sources in the shim's mount namespace
    staged_sources: tuple[StagedSource, ...]
    nosuid: tuple[str, ...]  # paths that nspawn binds and that must be mounted nosuid
    device_rules: tuple[DeviceRule, ...]
    credentials: Mapping[str, bytes]  # by their files, in the state directory
    copying: str  # a sentence about nspawn's copy of the image, "" if it makes none
    inside: ExecContext
    journal: Journal
    notes: tuple[str, ...]  # sentences for the task's events

    @property
    def mount_table(self) -> dict[str, str]:
        """The container's mounts for a View: targets to sources, "" for what nobody can look into. Of two with one
        target the first counts."""
        hidden = [*OWN_MOUNTS, *(["/var"] if self.options.volatile == "state" else []), *self.options.inaccessible]
        hidden += [overlay.target for overlay in self.options.overlays]
        hidden += [item.partition(":")[0] for item in self.options.tmpfs]
        table = {os.path.normpath(path): "" for path in hidden}
        return table | {mount.target.rstrip("/"): mount.source for mount in reversed(self.mounts)}

    def find_root(self, state_dir: Path) -> Path | None:
        """Return the image's directory or the private root, as the shim's namespace has it; None for a disk."""
        if self.private:
            return state_dir / "root"
        if not self.image.is_directory:
            return None
        staged = self.find_staged(self.image.fd)
        return Path(staged.path) if staged else self.image.opened

    def explain_fixed_root(self) -> str:
        """Return why no directory can be made in the container's root before the start, "" if one can."""
        if self.private:
            return ""
        if self.image.is_protected:
            return "the operator lets no task write to the image"
        if self.options.has_read_only_root:
            return "the image is read-only for this task"
        is_copied = self.options.ephemeral or self.options.is_volatile
        return "systemd-nspawn runs a copy of the image" if is_copied else ""

    def name_sources(self, line: str) -> str:
        """Return a message of nspawn with the host's paths instead of those in the state directory."""
        for staged in sorted(self.staged_sources, key=lambda staged: len(staged.path), reverse=True):
            line = line.replace(staged.path, staged.source.path)
        return line

    def find_staged(self, fd: int) -> StagedSource | None:
        return next((staged for staged in self.staged_sources if fd >= 0 and staged.source.fd == fd), None)


JOURNALS = "/var/log/journal"


@dataclass(frozen=True)
class Journal:
    """How the host shows a container's journal."""

    path: str = ""  # a path in JOURNALS, removed with the task; "" for no journal
    target: str = ""  # what `path` is a link to; "" if it is a directory that is mounted in the container
    notes: tuple[str, ...] = ()  # sentences for the task's events

    @property
    def mounts(self) -> tuple[Mount, ...]:
        return (Mount(self.path, self.path),) if self.path and not self.target else ()


def plan_journal(task: TaskConfig, options: JobOptions, found: HostInputs, root: RootPlan) -> Journal:
    """Return the journal to show on the host. It is named by the allocation's id: the image's machine id could be
    that of the host or another task. Raises ConfigError."""
    asked = options.link_journal or "no"
    kind = asked.removeprefix("try-")
    if kind in ("no", "auto"):
        return Journal()
    obstacle = found.journal_obstacle
    if kind == "host" and options.has_other_users:
        obstacle = "in a user namespace the container could not write there"
    if kind == "guest" and (root.private or options.ephemeral or not found.image.is_directory):
        obstacle = "the container's files are not in a directory of the host"
    if obstacle and not asked.startswith("try-"):
        raise ConfigError("link_journal", asked, f"is not possible: {obstacle}", "leave it out")
    if obstacle:
        return Journal(notes=(f"link_journal has no effect: {obstacle}.",))
    place = name_journal(task.alloc_id)
    return Journal(place, f"{found.image.path}{place}" if kind == "guest" else "")


def name_journal(alloc_id: str) -> str:
    return f"{JOURNALS}/{alloc_id.replace('-', '').lower()}"


@dataclass(frozen=True)
class HostInputs:
    """What was found on the host before a start is planned."""

    image: Image
    mounts: Mounts
    sources: Mapping[str, Source] = field(default_factory=dict)  # by the job's names for them
    credentials: Mapping[str, bytes] = field(default_factory=dict)
    names: NetworkInputs = NetworkInputs()
    devices: Mapping[Device, Source] = field(default_factory=dict)
    device_rules: tuple[DeviceRule, ...] = ()  # for the devices, and for nodes in binds and volumes
    directories: Mapping[str, Source] = field(default_factory=dict)  # of the task, and volumes, by path
    ephemeral_dir: str = ""  # the operator's, "" for the task's directory
    root_size: Size | None = None  # the operator's limit of private roots
    io_limits: tuple[str, ...] = ()  # lines for io.max
    account: Account | None = None
    hooks: tuple[Hook, ...] = ()  # of devices
    journal_obstacle: str = ""  # why the host cannot show the task's journal, "" if it can


def plan_task(
    rows: Sequence[Option], task: TaskConfig, options: JobOptions, host: Host, found: HostInputs
) -> Plan:
    """Plan the start of a task. Raises ConfigError."""
    check_rules(rows, options, host)
    state, machine = state_directory(task.id), plan_machine(task.name, task.alloc_id)
    root, staged_image = plan_image(task, options, host, found)
    network = plan_network(task.network, options, found.names, machine, is_disk=not found.image.is_directory)
    options = complete_options(task, options, network, found.account)
    given = {**options.environment, **task.env, **network.environ}
    variables = select_variables(given)
    files, journal = plan_files(task, options, found), plan_journal(task, options, found, root)
    mounts = (*files.mounts, *network.plan_mounts(state), *journal.mounts, *plan_unit_mounts(options, state))
    credentials = {key: f"{state}/credentials/{number}" for number, key in enumerate(found.credentials)}
    arguments = [
        *([] if root.private else render_image(found.image, staged_image)),
        *render_options(rows, strip_root(options) if root.private else options),
        *files.overlays,
        *(f"--load-credential={escape_field(key)}:{place}" for key, place in credentials.items()),
        *network.argv,
        *(mount.argv for mount in mounts),
        *render_bundle_options(options, state),
    ]
    return Plan(
        task_id=task.id,
        machine=machine,
        options=options,
        network=network,
        program=plan_program(options, machine),
        argv=plan_argv(task, options, host, arguments),
        environ=plan_environ(host),
        bundle=render_bundle(
            {**options.mode.environ, **variables, **plan_unit_environ(options, variables)}, found.account
        ),
        cgroup=plan_cgroup(host.cgroups, task.cgroup, task.alloc_id, task.name),
        limits=plan_limits(task.resources, options, host.cpus, found.io_limits),
        log_paths=(task.stdout_path, task.stderr_path),
        image=found.image,
        private=root.private,
        search_path=variables.get("PATH") or DEFAULT_PATH,
        mounts=mounts,
        staged_sources=(*files.staged_sources, *([staged_image] if staged_image else [])),
        nosuid=files.nosuid,
        device_rules=(*USUAL_DEVICES, *found.device_rules),
        credentials={credentials[key]: content for key, content in found.credentials.items()},
        copying=root.copying,
        inside=plan_exec_context(task, options, variables, found.account),
        journal=journal,
        notes=(*explain_variables(given), *network.notes, *journal.notes, *find_gaps(task, options, host, found)),
    )


def plan_image(
    task: TaskConfig, options: JobOptions, host: Host, found: HostInputs
) -> tuple[RootPlan, StagedSource | None]:
    """Return how the container gets its root, and the staged image if it is staged. Raises ConfigError."""
    check_image_rules(options, found.image, task.network)
    upper_dir = plan_upper_dir(task.task_dir, found.ephemeral_dir, plan_machine(task.name, task.alloc_id))
    root = plan_root(found.image, options, host, found.mounts, upper_dir, found.root_size)
    root = add_hooks(root, found.hooks)
    staged = stage_image(root, options, found.image, state_directory(task.id))
    if staged and root.private:
        root = replace(root, private=replace(root.private, layers=(staged.path,)))
    return root, staged


def add_hooks(root: RootPlan, hooks: tuple[Hook, ...]) -> RootPlan:
    """Refuse hooks of devices if what they change would be changed in the image. Raises ConfigError."""
    if not hooks:
        return root
    if not root.private:
        rule, remedy = f"its hook {hooks[0].path} needs a root of the task's own", "set ephemeral = true"
        raise ConfigError(
            "devices.host_path", hooks[0].device, rule, f"{remedy}, with an image that is a directory"
        )
    return replace(root, private=replace(root.private, hooks=hooks))


def find_gaps(task: TaskConfig, options: JobOptions, host: Host, found: HostInputs) -> Iterator[str]:
    """Yield a sentence for each thing that the task cannot have as it should on this machine."""
    yield from explain_limits(options, host)
    yield from explain_labels(task, host)
    yield from explain_volumes(task, options, found.mounts)


def complete_options(
    task: TaskConfig, options: JobOptions, network: NetworkPlan, account: Account | None
) -> JobOptions:
    """Return the options with what the task and its network decide. Raises ConfigError."""
    mode = options.mode
    user = None if mode is Mode.BOOT else options.user  # an init must run as root
    if task.user and mode is not Mode.BOOT:
        given = check_user("user", decode_string("user", task.user))
        user = user or given
    return replace(
        options,
        console=options.console or ("pipe" if options.adds_units else mode.console),
        user=None if account else user,  # an account is in the bundle
        resolv_conf="off" if "/etc/resolv.conf" in network.files else options.resolv_conf,
    )


def strip_root(options: JobOptions) -> JobOptions:
    """Return the options without those that a private root carries out."""
    volatile = None if options.volatile == "overlay" else options.volatile
    return replace(options, ephemeral=False, volatile=volatile, private_users=None, private_users_ownership=None)


def explain_limits(options: JobOptions, host: Host) -> Iterator[str]:
    """Yield a sentence for each limit that the job's options ask for and this machine does not have."""
    needed = {"cpu_hard_limit": "cpu", "memory_swap_max": "memory", "io_weight": "io"}
    for option, controller in needed.items():
        if getattr(options, option) and controller not in host.controllers:
            why = f"this machine has no cgroup v2 controller {controller}"
            yield f"{option} has no effect: {why}."


def plan_argv(task: TaskConfig, options: JobOptions, host: Host, arguments: Sequence[str]) -> tuple[str, ...]:
    """Return nspawn's arguments."""
    # nspawn 261 and later print a note at every start, even with --quiet, unless this option is given.
    is_noisy = host.systemd >= 261 and not options.restrict_address_families
    return (
        "--quiet",
        "--keep-unit",
        "--register=no",
        "--link-journal=no",  # "auto" mounts the host's journal of the image's machine id
        *([f"--uuid={task.alloc_id}"] if UUID.fullmatch(task.alloc_id) else []),
        *(["--restrict-address-families="] if is_noisy else []),
        *([] if can_make_devices(options) else ["--drop-capability=CAP_MKNOD"]),
        *arguments,
        *(["--", *options.command] if options.command else []),  # what follows "--" is data
    )


def can_make_devices(options: JobOptions) -> bool:
    """Whether a container keeps CAP_MKNOD. In a user namespace the kernel makes no nodes anyway. Elsewhere its
    lack helps to protect the host's disks; without a device policy, nothing else does."""
    return options.user_namespacing or not {"CAP_MKNOD", "all"}.isdisjoint(options.capability)


def plan_program(options: JobOptions, machine: str) -> tuple[str, ...]:
    """Return systemd-nspawn, with the machine's name first because people look for it with `ps`, and what starts
    it. nspawn's own --oom-score-adjust= fails with user namespaces: "Permission denied" (measured on 252)."""
    score = options.oom_score_adjust
    starter = () if score is None else ("choom", "-n", str(score), "--")
    return (*starter, "systemd-nspawn", f"--machine={machine}")


def check_image_rules(options: JobOptions, image: Image, group: GroupNetwork) -> None:
    if group.namespace and options.user_namespacing and not image.is_directory:
        rule = "is not possible for a disk image in a group's network"
        raise ConfigError("user_namespacing", True, rule, "set it to false, or use an image that is a directory")
    for option in ("image_policy", "root_hash"):
        if getattr(options, option) and image.is_directory:
            rule = f"is for disk images, and {image.path} is a directory"
            raise ConfigError(option, getattr(options, option), rule, "leave it out")


def stage_image(root: RootPlan, options: JobOptions, image: Image, state: Path) -> StagedSource | None:
    """Return where to mount an image for nspawn so that nobody can exchange it, None if it can be used as it is.
    Raises ConfigError."""
    if image.fd < 0:
        return None
    if options.ephemeral and not root.private and not image.is_fixed:
        rule = "would have systemd-nspawn copy an image that others can exchange meanwhile"
        remedy = "leave it out for an image of the task's own; others can lie in the client's image_dir"
        raise ConfigError("ephemeral", True, rule, remedy)
    # nspawn puts its copy beside the image, and looks there for the files that verify a disk image.
    if image.is_fixed and not root.private and (options.ephemeral or not image.is_directory):
        return None
    return StagedSource(Source(str(image.path), os.fstat(image.fd).st_mode, image.fd), f"{state}/{IMAGE_PLACE}")


def render_image(image: Image, staged: StagedSource | None) -> list[str]:
    """Return nspawn's arguments for an image that it mounts itself."""
    return [f"--{'directory' if image.is_directory else 'image'}={staged.path if staged else image.path}"]


IMAGE_PLACE, DEVICES_PLACE, BUNDLE_PLACE = "image", "devices", "bundle"  # in the state directory


def stage_sources(sources: Mapping[str, Source], state: Path) -> dict[str, StagedSource]:
    """Return where each source is mounted for nspawn, under the key of the source."""
    return {
        name: StagedSource(source, f"{state}/mounts/{number}")
        for number, (name, source) in enumerate(sources.items())
    }


def stage_directories(
    task: TaskConfig, sources: Mapping[str, Source], state: Path
) -> dict[tuple[str, str], StagedSource]:
    """Return where the task's directories and Nomad's volumes are mounted for nspawn, by path and propagation."""
    wanted = dict.fromkeys((mount.source, mount.propagation) for mount in (*task.directory_mounts, *task.mounts))
    return {
        (path, propagation): StagedSource(
            sources[path], f"{state}/directories/{number}", is_private=propagation == "private"
        )
        for number, (path, propagation) in enumerate(wanted)
    }


@dataclass(frozen=True)
class Files:
    """What a container gets of the host's files."""

    staged_sources: tuple[StagedSource, ...]
    mounts: tuple[Mount, ...]  # of the staged sources
    overlays: tuple[str, ...]  # nspawn's arguments
    nosuid: tuple[str, ...]


def plan_files(task: TaskConfig, options: JobOptions, found: HostInputs) -> Files:
    """Return what the container gets of the host's files, all staged. Raises ConfigError."""
    state = state_directory(task.id)
    directories = stage_directories(task, found.directories, state)
    staged_sources = stage_sources(found.sources, state)
    nodes = [
        StagedSource(source, f"{state}/{DEVICES_PLACE}/{number}", is_node=True)
        for number, source in enumerate(found.devices.values())
    ]
    # Without it, before Linux 6.3, the nodes belong to `nobody` in a user namespace.
    mapping = ("idmap",) if options.has_other_users and found.mounts.have_idmap("/run") else ()
    devices = [
        Mount(staged.path, device.target, options=mapping)
        for device, staged in zip(found.devices, nodes, strict=True)
    ]
    binds = [replace(mount, source=staged_sources[mount.source].path) for mount in options.binds]
    volumes = plan_volumes(task, options, found.mounts, directories)
    places = {name: staged.path for name, staged in staged_sources.items()}
    return Files(
        staged_sources=(*staged_sources.values(), *directories.values(), *nodes),
        mounts=(*binds, *devices, *volumes),
        overlays=tuple(overlay.render(places) for overlay in options.overlays),
        # Files of the host's root in an id-mapped mount belong to root inside, too: without nosuid, a set-user-id
        # file that another task made would make any user inside root.
        nosuid=tuple({mount.source: None for mount in (*binds, *volumes) if mount.is_mapped or mount.is_nosuid}),
    )


def render_bundle_options(options: JobOptions, state: Path) -> Iterator[str]:
    """Yield --oci-bundle, and two options that a bundle turns off unless they are given (252, 257, 262)."""
    for option in ("timezone", "resolv_conf"):
        if not getattr(options, option):
            yield f"--{option.replace('_', '-')}=auto"
    yield f"--oci-bundle={state / BUNDLE_PLACE}"


def plan_environ(host: Host) -> dict[str, str]:
    """Return the variables for nspawn beside the usual ones."""
    # A v1 hierarchy cannot be delegated to a user namespace: without this nothing boots in one (measured).
    return {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"} if host.cgroups is CgroupMode.HYBRID else {}


def check_init(plan: Plan, view: View) -> None:
    """Raise ConfigError if there is no init: nspawn would report a container as up that ends at once. Blocks."""
    places = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/sbin/init")
    kinds = set()
    try:
        for place in places:
            if (fd := view.open(place)) is not None:
                try:
                    kinds.add(is_foreign(fd))
                finally:
                    os.close(fd)
    except OSError:
        return  # not known: nspawn will find it, or say what is missing
    if kinds == {True}:
        rule = f"holds a system for another machine than this {os.uname().machine}"
        raise ConfigError("image", str(plan.image.path), rule, "use an image for this architecture")
    if not kinds:
        rule = f"the image has no init ({', '.join(places)})"
        raise ConfigError(
            "boot", True, rule, "set boot = false to run its command, or use an image of a whole system"
        )


def check_journal(plan: Plan, view: View) -> None:
    """Raise ConfigError if there is no journal to forward. Blocks."""
    places = ("/usr/bin/journalctl", "/bin/journalctl", "/nix/store")  # NixOS has it in there
    try:
        found = [fd for place in places if (fd := view.open(place)) is not None]
    except OSError:
        return  # not known: journal.sh will see
    for fd in found:
        os.close(fd)
    if not found:
        raise ConfigError(
            "journal", True, "the image has no journalctl", "leave it out: the console is the log then"
        )


def render_options(rows: Sequence[Option], options: JobOptions) -> list[str]:
    return [argument for option in rows for argument in option.argv(getattr(options, option.name))]


def plan_volumes(
    task: TaskConfig, options: JobOptions, mounts: Mounts, directories: Mapping[tuple[str, str], StagedSource]
) -> list[Mount]:
    """Return the mounts of the task's directories and of Nomad's volumes. Raises ConfigError."""

    def plan(mount: Mount) -> Mount:
        # "idmap" shows the host's ids inside, so root and all users of the container can use their files.
        # "rootidmap" maps the directory's owner (nobody) to root: then root cannot read its own files, and no
        # other user can create any (measured on 252).
        staged = directories[mount.source, mount.propagation]
        can_map = options.has_other_users and mounts.have_idmap(staged.source.path)
        # The logs never: root inside could open log FIFOs of other tasks that belong to the host's root.
        is_mapped = can_map and mount.source != task.log_dir
        return replace(mount, source=staged.path, options=("idmap",) if is_mapped else ())

    for mount in task.mounts:
        check_container_path(mount.option, mount.target)
        check_propagation(mount, options)
    return [plan(mount) for mount in (*task.directory_mounts, *task.mounts)]


def explain_labels(task: TaskConfig, host: Host) -> Iterator[str]:
    """Yield a sentence for each label of a volume where there are no labels. Where there are, raises ConfigError:
    to give files one is not implemented."""
    for mount in task.mounts:
        if mount.selinux_label and host.has_selinux:
            rule = "is not possible: this driver gives no labels to the files of volumes"
            remedy = "leave it out, and label them on the host with semanage fcontext and restorecon"
            raise ConfigError("volume_mount.selinux_label", mount.selinux_label, rule, remedy)
        if mount.selinux_label:
            yield f"selinux_label of the volume {mount.target} has no effect: SELinux is off on this host."


def check_propagation(mount: Mount, options: JobOptions) -> None:
    option = "volume_mount.propagation_mode"
    if mount.propagation == "bidirectional":
        rule = "systemd-nspawn cannot pass mounts back to the host"
        raise ConfigError(option, mount.propagation, rule, "use private or host-to-task")
    if mount.shows_later_mounts and mount.read_only and options.has_other_users:
        # Without a user namespace, root inside can make any mount writable anyway.
        rule = "cannot be combined with read_only in a user namespace: the kernel would show later mounts writable"
        raise ConfigError(option, mount.propagation, rule, "leave out one of the two, or user namespaces")


def explain_volumes(task: TaskConfig, options: JobOptions, mounts: Mounts) -> Iterator[str]:
    """Yield a sentence for each place of the task whose files the users of the container cannot own."""
    if not options.has_other_users:
        return
    for mount in task.mounts:
        if mount.shows_later_mounts:
            yield (
                f"What the host mounts below {mount.target} later cannot be id-mapped: its files will seem to "
                "belong to nobody, and the container can write only where everybody may."
            )
    places = {"/alloc": task.shared_dir} if task.alloc_dir else {}
    places |= {mount.target: mount.source for mount in task.mounts if mount.option == "volume_mount"}
    for target, source in places.items():
        if not mounts.have_idmap(source):
            kind = mounts.filesystem(source) or "a file system"
            yield (
                f"{target} is on {kind}, which cannot be id-mapped on this machine: its files seem to belong to "
                "nobody, and the container can write only where everybody may; set "
                "user_namespacing = false, or use a file system that can be id-mapped, such as ext4 or xfs."
            )
