# SPDX-License-Identifier: MPL-2.0
"""Tasks outlive the plugin, the agent, the shim; and what does not come back is told at once.

The plugin is killed here as a crash would, and its successor gets the handle as an agent has it: whole under a
living agent, without the driver config after a restart of the agent.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nomad_pb import driver_pb2
from tests.agent import HANG, Allocation, DriverError, Plugin, Port, Resources, Task, call, launch_like_agent
from tests.containers import Tasks, driver_state, eventually, is_alive, kill, leader, nspawn, output, shim
from tests.leftovers import STATE, leftovers

RESTARTS = pytest.mark.parametrize("agent_restart", [False, True], ids=["plugin crash", "agent restart"])
FOREVER = "while :; do sleep 0.05; done"
Launch = Callable[[], Plugin]


@pytest.fixture
def launch(driver_file: Path) -> Iterator[Launch]:
    """Starts plugins; those that still run at the end must not have broken any rule."""
    made: list[Plugin] = []

    def start() -> Plugin:
        made.append(launch_like_agent(driver_file))
        return made[-1]

    yield start
    last = [plugin for plugin in made if not plugin.exited()]
    for plugin in last:
        plugin.kill()
    assert not [violation for plugin in last for violation in plugin.violations]


@pytest.fixture
def tasks(launch: Launch, image: Path) -> Iterator[Tasks]:
    """Tasks of a plugin that tests may kill."""
    made = Tasks(launch(), image)
    yield made
    if made.plugin.exited():
        made.plugin = launch()
    made.close()


def crash(tasks: Tasks) -> None:
    os.kill(tasks.plugin.pid, signal.SIGKILL)
    tasks.plugin.kill_hard()


def recover(tasks: Tasks, launch: Launch, task: Task, *, agent_restart: bool = True) -> None:
    """Kill the task's plugin and have a new one take over."""
    if not tasks.plugin.exited():
        crash(tasks)
    tasks.plugin = launch()
    task.recover(tasks.plugin, agent_restart=agent_restart)


# -- the task goes on ----------------------------------------------------------------------------------------


@RESTARTS
def test_task_goes_on_and_loses_nothing(tasks: Tasks, launch: Launch, agent_restart: bool) -> None:
    """Lines written during the crash arrive in order, and the exit code is the task's own."""
    script = "i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit 42"
    task = tasks.start(script)
    task.logmon.wait_for("line 2\n")
    crash(tasks)
    if agent_restart:
        task.logmon.stop(0)
    time.sleep(0.5)
    recover(tasks, launch, task, agent_restart=agent_restart)
    result = task.wait()
    assert (result.exit_code, result.err) == (42, "")
    assert output(task).splitlines() == [f"line {number}" for number in range(30)]


@RESTARTS
def test_booted_system_goes_on(tasks: Tasks, launch: Launch, agent_restart: bool) -> None:
    task = tasks.boot(kill_timeout=HANG)
    recover(tasks, launch, task, agent_restart=agent_restart)
    task.logmon.wait_for("Reached target multi-user.target")
    task.stop()
    assert task.wait().successful
    assert "Reached target poweroff.target" in output(task)


def test_only_the_next_change_of_health_is_told(tasks: Tasks, launch: Launch) -> None:
    task = tasks.boot(private_network=True)

    def told() -> list[str]:
        return [event.message for event in task.events if "system inside" in event.message]

    eventually(lambda: told() == ["The system inside is running."])
    recover(tasks, launch, task)
    task.exec(["systemd-run", "--unit=app", "false"])
    eventually(lambda: told() == ["The system inside is degraded. Failed units: app.service."])


def test_orderly_end_of_the_plugin_spares_its_tasks(tasks: Tasks, launch: Launch) -> None:
    task = tasks.start(FOREVER)
    tasks.plugin.kill(driver_shutdown=True)
    assert not tasks.plugin.violations
    assert is_alive(leader(task))
    recover(tasks, launch, task)
    assert task.inspect().task.state == driver_pb2.RUNNING


def test_sigterm_to_the_plugin_spares_its_tasks(tasks: Tasks, launch: Launch) -> None:
    """As a service manager that stops the agent's whole group of processes."""
    task = tasks.start(FOREVER)
    os.kill(tasks.plugin.pid, signal.SIGTERM)
    assert tasks.plugin.exited(5)
    tasks.plugin.kill_hard()
    assert is_alive(leader(task))
    recover(tasks, launch, task)


def test_everything_works_after_recovery(tasks: Tasks, launch: Launch) -> None:
    task = tasks.start("trap 'echo got HUP' HUP; trap 'exit 6' TERM; echo ready; while :; do sleep 0.05; done")
    task.logmon.wait_for("ready\n")
    recover(tasks, launch, task)
    task.signal("SIGHUP")
    task.logmon.wait_for("got HUP\n")
    stats = next(task.stats(0.2))
    assert stats.agg_resource_usage.memory.usage > 0
    status = task.inspect().task
    assert status.id == task.id and status.state == driver_pb2.RUNNING
    assert abs(status.started_at.ToNanoseconds() / 1e9 - time.time()) < 60
    with pytest.raises(DriverError, match="running"):
        task.destroy(force=False)
    task.stop(timeout=HANG)
    assert task.wait().exit_code == 6
    task.destroy()
    assert leftovers(task.allocation.id) == []


@pytest.mark.parametrize("mode", [{}, {"process_two": True}, {"network_veth": True}, {"user_namespacing": False}])
def test_stop_by_force_after_recovery(tasks: Tasks, launch: Launch, mode: dict[str, bool]) -> None:
    task = tasks.start(f"trap '' TERM; echo ready; {FOREVER}", **mode)
    task.logmon.wait_for("ready\n")
    recover(tasks, launch, task)
    task.stop(timeout=0.3)
    result = task.wait()
    assert (result.exit_code, result.signal) == (137, 9)
    assert "kill_timeout" in result.err


def test_destroy_of_a_running_recovered_task(tasks: Tasks, launch: Launch) -> None:
    task = tasks.start(FOREVER, network_veth=True)
    recover(tasks, launch, task)
    task.destroy()
    assert leftovers(task.allocation.id) == []


@RESTARTS
def test_task_that_ended_meanwhile_keeps_its_exit_code(tasks: Tasks, launch: Launch, agent_restart: bool) -> None:
    task = tasks.start("sleep 0.3; echo last words; exit 23")
    crash(tasks)
    eventually(lambda: not is_alive(shim(task)))
    recover(tasks, launch, task, agent_restart=agent_restart)
    result = task.wait()
    assert (result.exit_code, result.signal, result.err) == (23, 0, "")
    assert task.inspect().task.state == driver_pb2.EXITED
    assert "last words\n" in task.logmon.stdout.decode()


def test_machine_without_descriptors_costs_no_exit_code(tasks: Tasks) -> None:
    """That a file cannot be opened does not mean that it is gone."""
    task = tasks.start("until [ -e /local/go ]; do sleep 0.05; done; exit 23")
    limits = resource.prlimit(tasks.plugin.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(tasks.plugin.pid, resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        Path(task.allocation.dir, task.name, "local/go").touch()
        eventually(lambda: not is_alive(shim(task)))
        time.sleep(0.5)  # the plugin has noticed
    finally:
        resource.prlimit(tasks.plugin.pid, resource.RLIMIT_NOFILE, limits)
    result = task.wait()
    assert (result.exit_code, result.err) == (23, "")


def test_reason_of_a_kill_survives(tasks: Tasks, launch: Launch) -> None:
    """The agent restarts after StopTask and before it has asked how the task ended."""
    task = tasks.start(f"trap '' TERM; echo ready; {FOREVER}")
    task.logmon.wait_for("ready\n")
    task.stop(timeout=0.3)
    before = task.wait()
    recover(tasks, launch, task)
    assert task.wait() == before
    assert "kill_timeout" in before.err


def test_recovered_twice(tasks: Tasks, launch: Launch) -> None:
    """An agent that crashed alone finds the plugin again: it knows the task already."""
    task = tasks.start(FOREVER)
    task.recover(tasks.plugin)
    task.recover(tasks.plugin, agent_restart=False)
    recover(tasks, launch, task)
    task.recover(tasks.plugin)
    assert is_alive(leader(task))
    task.stop(timeout=0)
    assert task.wait().signal == 9


def test_many_crashes(tasks: Tasks, launch: Launch) -> None:
    task = tasks.start("trap 'exit 8' TERM; while :; do sleep 0.05; done")
    for _ in range(4):
        recover(tasks, launch, task)
        with pytest.raises(TimeoutError):
            task.wait(0.05)
    task.stop(timeout=HANG)
    assert task.wait().exit_code == 8


def test_many_tasks_are_recovered(tasks: Tasks, launch: Launch) -> None:
    running = [tasks.start(f"sleep 2; exit {code}") for code in range(10)]
    crash(tasks)
    tasks.plugin = launch()
    for task in running:
        task.recover(tasks.plugin)
    assert [task.wait().exit_code for task in running] == list(range(10))


# -- the last words ------------------------------------------------------------------------------------------

LAST_WORDS = 60_000  # bytes; a pipe takes 64 KB
TALK = f"until [ -e /local/go ]; do sleep 0.02; done; head -c {LAST_WORDS} /dev/zero; echo last words >&2"


def end_unread(task: Task) -> None:
    """Let a task talk and end while nobody reads."""
    task.logmon.stop(0)
    (task.dir / "local/go").touch()
    eventually(lambda: not is_alive(shim(task)))


def check_last_words(task: Task) -> None:
    task.logmon.wait_eof()
    assert (len(task.logmon.stdout), task.logmon.stderr) == (LAST_WORDS, b"last words\n")


@pytest.mark.parametrize("moment", ["never", "before the end", "after the end"])
def test_last_words_wait_for_a_reader(tasks: Tasks, launch: Launch, moment: str) -> None:
    """The log collector goes away before the task ends; the plugin may crash at that moment."""
    task = tasks.start(TALK)
    if moment == "before the end":
        crash(tasks)
    end_unread(task)
    if moment == "never":
        assert task.wait().successful
        task.logmon.restart()
    else:
        recover(tasks, launch, task)
        assert task.wait().successful
    check_last_words(task)


def test_last_words_survive_a_destroy_that_comes_first(tasks: Tasks, launch: Launch) -> None:
    """An agent that has restarted starts its log collector, and destroys the ended task at the same time."""
    task = tasks.start(TALK)
    crash(tasks)
    end_unread(task)
    tasks.plugin = launch()
    task.recover(tasks.plugin, agent_restart=False)
    assert task.wait().successful
    task.destroy()
    task.logmon.restart()
    check_last_words(task)
    assert leftovers(task.allocation.id) == []


def test_last_words_of_a_booted_system_wait_for_a_reader(tasks: Tasks) -> None:
    task = tasks.boot(kill_timeout=HANG)
    task.logmon.wait_for("Reached target multi-user.target")
    task.logmon.stop(0)
    task.stop()
    assert task.wait().successful
    task.logmon.restart()
    task.logmon.wait_eof()
    assert b"Reached target poweroff.target" in task.logmon.stdout


# -- what is gone --------------------------------------------------------------------------------------------


def refused(task: Task, plugin: Plugin) -> str:
    """What RecoverTask says."""
    with pytest.raises(DriverError) as caught:
        task.recover(plugin)
    return caught.value.text


def test_destroyed_task_is_gone(tasks: Tasks, launch: Launch) -> None:
    task, _ = tasks.run("true")
    task.destroy()
    assert task.id in refused(task, tasks.plugin)
    crash(tasks)
    tasks.plugin = launch()
    assert task.id in refused(task, tasks.plugin)


def test_task_whose_state_is_gone_is_gone(tasks: Tasks, launch: Launch) -> None:
    task, _ = tasks.run("true")
    crash(tasks)
    (directory,) = STATE.glob(f"{task.allocation.id}*")
    directory.rename(directory.with_name("elsewhere"))
    tasks.plugin = launch()
    try:
        assert task.id in refused(task, tasks.plugin)
    finally:
        directory.with_name("elsewhere").rename(directory)
    task.destroy()


def test_state_of_an_earlier_boot_is_not_believed(tasks: Tasks, launch: Launch) -> None:
    task = tasks.start(FOREVER)
    crash(tasks)
    tasks.plugin = launch()
    assert task.handle
    changed = {**driver_state(task), "boot_id": "00000000-0000-0000-0000-000000000000"}
    task.handle.driver_state = json.dumps(changed).encode()
    assert "this machine was restarted" in refused(task, tasks.plugin)
    task.destroy()
    assert leftovers(task.allocation.id) == []


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b"null", b'{"version": 99}', b'{"version": 1}', b"\xff\x00"])
def test_state_that_cannot_be_read_is_an_error(tasks: Tasks, launch: Launch, state: bytes) -> None:
    """Of another version, or damaged; and DestroyTask, which follows, cleans up all the same."""
    task = tasks.start(FOREVER)
    crash(tasks)
    tasks.plugin = launch()
    assert task.handle
    task.handle.driver_state = state
    assert refused(task, tasks.plugin)
    task.destroy()
    assert leftovers(task.allocation.id) == []


def test_handle_of_another_task_is_refused(tasks: Tasks) -> None:
    one, other = tasks.start(FOREVER), tasks.make(FOREVER)
    assert one.handle
    other.id = f"{other.allocation.id}/task/00000000"
    handle = driver_pb2.TaskHandle()
    handle.CopyFrom(one.handle)
    handle.config.id = other.id
    with pytest.raises(DriverError):
        call(tasks.plugin.driver.RecoverTask, driver_pb2.RecoverTaskRequest(handle=handle), HANG)


def test_recovery_needs_the_handle_alone(tasks: Tasks, launch: Launch) -> None:
    task = tasks.start("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done")
    task.logmon.wait_for("ready\n")
    crash(tasks)
    (directory,) = STATE.glob(f"{task.allocation.id}*")
    whole = (directory / "state.json").read_text()
    (directory / "state.json").write_text("{ damaged")
    recover(tasks, launch, task)
    task.stop(timeout=HANG)
    assert task.wait().exit_code == 7
    task.destroy()
    assert leftovers(task.allocation.id) == [], whole


def test_destroy_after_failed_recovery_with_damaged_state(tasks: Tasks, launch: Launch) -> None:
    """Neither the handle nor the state directory can be read: the task's name and id are all there is."""
    task = tasks.start(FOREVER)
    crash(tasks)
    (directory,) = STATE.glob(f"{task.allocation.id}*")
    (directory / "state.json").write_text("{ damaged")
    tasks.plugin = launch()
    assert task.handle
    task.handle.driver_state = b"{ damaged"
    assert refused(task, tasks.plugin)
    task.destroy()
    assert leftovers(task.allocation.id) == []


# -- shim and nspawn ---------------------------------------------------------------------------------------


def test_killed_shim_does_not_take_the_task_along(tasks: Tasks) -> None:
    task = tasks.start("trap 'echo got TERM; exit 3' TERM; echo ready; while :; do sleep 0.05; done")
    task.logmon.wait_for("ready\n")
    kill(shim(task))
    with pytest.raises(TimeoutError):
        task.wait(0.5)
    assert is_alive(leader(task))
    task.stop(timeout=HANG)
    result = task.wait()
    assert not result.successful
    assert "shim was killed" in result.err and "exit code" in result.err
    assert b"got TERM\n" in task.logmon.stdout


@pytest.mark.parametrize("order", [(shim, nspawn), (nspawn, shim)])
def test_killed_shim_and_nspawn_end_the_task(tasks: Tasks, order: tuple[Callable[[Task], int], ...]) -> None:
    task = tasks.start(FOREVER)
    payload = leader(task)
    os.kill(shim(task), signal.SIGSTOP)  # or it would leave a record of the other's end
    for pid in [find(task) for find in order]:
        kill(pid)
    result = task.wait()
    assert (result.exit_code, result.signal) == (137, 9)
    assert "shim and systemd-nspawn were killed" in result.err
    assert not is_alive(payload)


def test_shim_killed_while_no_plugin_runs(tasks: Tasks, launch: Launch) -> None:
    task = tasks.start(FOREVER)
    crash(tasks)
    kill(shim(task))
    recover(tasks, launch, task)
    with pytest.raises(TimeoutError):
        task.wait(0.3)
    task.stop(timeout=0)
    assert "shim" in task.wait().err
    task.destroy()
    assert leftovers(task.allocation.id) == []


def test_shim_and_container_ended_while_no_plugin_runs(tasks: Tasks, launch: Launch) -> None:
    """The next plugin says what the one before would have said."""
    task = tasks.start(FOREVER)
    pids = [leader(task), nspawn(task)]
    crash(tasks)
    kill(shim(task))
    kill(pids[0])
    eventually(lambda: not any(map(is_alive, pids)))
    recover(tasks, launch, task)
    result = task.wait()
    assert (result.exit_code, result.signal) == (1, 0)
    assert "shim was killed" in result.err
    task.destroy()
    assert leftovers(task.allocation.id) == []


@RESTARTS
def test_nspawn_killed_while_no_plugin_runs(tasks: Tasks, launch: Launch, agent_restart: bool) -> None:
    task = tasks.start(f"sleep 600 & {FOREVER}")
    outer, payload = nspawn(task), leader(task)
    crash(tasks)
    kill(outer)
    recover(tasks, launch, task, agent_restart=agent_restart)
    result = task.wait()
    assert not result.successful
    assert "systemd-nspawn" in result.err and "killed" in result.err
    assert not is_alive(payload)


def test_nspawn_and_shim_killed_while_no_plugin_runs(tasks: Tasks, launch: Launch) -> None:
    task = tasks.start(FOREVER)
    outer = nspawn(task)
    crash(tasks)
    kill(shim(task))
    kill(outer)
    recover(tasks, launch, task)
    task.stop(timeout=0)
    assert not task.wait().successful
    task.destroy()
    assert leftovers(task.allocation.id) == []


# -- two plugins ---------------------------------------------------------------------------------------------


def test_two_plugins_at_once(tasks: Tasks, launch: Launch) -> None:
    """An agent's upgrade can overlap: both know how the task ended, and neither disturbs the other."""
    task = tasks.start("trap 'exit 12' TERM; echo ready; while :; do sleep 0.05; done")
    task.logmon.wait_for("ready\n")
    first, second = tasks.plugin, launch()
    task.recover(second)
    others = tasks.start(FOREVER, plugin=second)
    task.stop(timeout=HANG)
    assert task.wait().exit_code == 12
    task.plugin = first
    assert task.wait().exit_code == 12
    task.destroy()
    assert is_alive(leader(others))
    others.stop(timeout=0)


def test_plugins_that_come_and_go_leave_tasks_alone(tasks: Tasks, launch: Launch) -> None:
    """The agent starts the file several times only to ask what it is."""
    task = tasks.start(FOREVER)
    for _ in range(2):
        launch().kill()
    assert is_alive(leader(task))
    assert task.inspect().task.state == driver_pb2.RUNNING


# -- a reboot of the host, in two halves: see test_hosts.py ---------------------------------------------------

REBOOT = Path("/disk")  # what a reboot leaves
NEW_ROOT = "test -e /usr/mine || echo a new root; touch /usr/mine; exec sleep 1d"


def make_task(tasks: Tasks, allocation: Allocation) -> Task:
    """One with all that may be left of a task: a root of its own, users, a link, a mapped port."""
    resources = Resources(ports={"http": Port(8080, host_ip="192.0.2.2")})
    return tasks.make(
        NEW_ROOT,
        allocation=allocation,
        ephemeral=True,
        network_veth=True,
        port_map=[{"http": 80}],
        resources=resources,
    )


def before_reboot(driver_file: Path, image: Path) -> None:
    task = make_task(Tasks(launch_like_agent(driver_file), image), Allocation(REBOOT))
    task.start()
    task.logmon.wait_for("a new root\n")
    assert task.handle
    (REBOOT / "saved").write_bytes(pickle.dumps((task.allocation, task.id, task.handle.SerializeToString())))
    os._exit(0)  # nothing is closed


def after_reboot(driver_file: Path, image: Path) -> None:
    """The agent asks for the task of its stored state, hears that it is lost, has it destroyed and starts anew."""
    allocation, task_id, handle = pickle.loads((REBOOT / "saved").read_bytes())
    allocation._mounts = []  # they went with the kernel
    with launch_like_agent(driver_file) as plugin, Tasks(plugin, image) as tasks:
        task = make_task(tasks, allocation)
        task.id, task.handle = task_id, driver_pb2.TaskHandle.FromString(handle)
        place = allocation.dir / "task/.nspawn-root"
        assert place.is_dir()
        assert f"task {task_id} has ended: this machine was restarted" in refused(task, plugin)
        task.destroy()
        assert not place.exists()
        assert leftovers(allocation.id) == []
        task.start()
        task.logmon.wait_for("a new root\n")
    assert not plugin.violations
