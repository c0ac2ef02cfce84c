"""Rounds of agents on Flower: what server and clients do, and a grid that runs the clients in this process."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from peft_ext.adapters.federated import check_agents
from recipes.federation.agents import AGREE, AVERAGE, Agent, Federation
from recipes.federation.results import FederatedResult
from recipes.support.arguments import UserError
from recipes.support.methods import Method

_ARRAYS, _CONFIG, _METRICS, _STATE, _SAMPLES = "arrays", "config", "metrics", "numbers", "num-examples"
_PATIENCE = 3600  # seconds that the server waits for answers
_VALUES = "values"  # the one array that a message has


def packed(values: torch.Tensor) -> ArrayRecord:
    """Returns numbers as what Flower sends."""
    return ArrayRecord({_VALUES: Array(values.numpy())})


def unpacked(record: ArrayRecord) -> torch.Tensor:
    """Returns the numbers of a message."""
    return torch.from_numpy(record[_VALUES].numpy().copy())


def make_client(known: Callable[[Context], tuple[Federation, Sequence[Method]]]) -> ClientApp:
    """Returns the app that runs at every agent.

    Args:
        known: what an agent knows, by the context that Flower gives it: data and base model, and the methods.
    """
    app = ClientApp()

    def agent_of(message: Message, context: Context) -> Agent:
        federation, methods = known(context)
        config = message.content.config_records[_CONFIG]
        (method,) = (each for each in methods if each.folder == config["method"])
        count, agents = int(context.node_config["num-partitions"]), federation.args.agents
        if count != agents:
            raise UserError(f"agents: the node has num-partitions={count}, and agents is {agents}; give both the same")
        number = int(context.node_config["partition-id"])
        return federation.agent(method, str(config["way"]), int(config["seed"]), number)  # type: ignore[arg-type]

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        """Says who the agent is, how many samples it has, and what its numbers mean."""
        agent = agent_of(message, context)
        said = ConfigRecord(
            {"agent": agent.number, "samples": agent.samples, "means": json.dumps(agent.exchange.description)}
        )
        return Message(RecordDict({_CONFIG: said}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Trains on the agent's part, and returns the numbers that are averaged, or outputs."""
        agent = agent_of(message, context)
        config = message.content.config_records[_CONFIG]
        if config["way"] == AVERAGE:
            agent.exchange.vector = unpacked(message.content.array_records[_ARRAYS])
        elif int(config["server-round"]) > 1:  # type: ignore[arg-type]
            # On machines that Flower connects the state outlives a run with one seed.
            agent.exchange.vector = unpacked(context.state.array_records[_STATE])
        agent.learn(int(config["server-round"]))  # type: ignore[arg-type]
        vector = agent.exchange.vector
        if config["way"] == AGREE:
            context.state[_STATE] = packed(vector)
        sent = packed(vector if config["way"] == AVERAGE else agent.outputs())
        metrics = MetricRecord({_SAMPLES: agent.samples})
        return Message(RecordDict({_ARRAYS: sent, _METRICS: metrics}), reply_to=message)

    @app.evaluate()
    def agree(message: Message, context: Context) -> Message:
        """Learns the outputs that all agents have in the mean, and measures the agent."""
        agent = agent_of(message, context)
        agent.exchange.vector = unpacked(context.state.array_records[_STATE])
        number = int(message.content.config_records[_CONFIG]["server-round"])  # type: ignore[arg-type]
        agent.agree(number, unpacked(message.content.array_records[_ARRAYS]))
        context.state[_STATE] = packed(agent.exchange.vector)
        # By what it was measured on, which is the same for all: the strategy's mean is one over agents.
        metrics = MetricRecord({_SAMPLES: len(agent.federation.test), "accuracy": agent.accuracy()})
        return Message(RecordDict({_METRICS: metrics}), reply_to=message)

    return app


class Exchanging(FedAvg):
    """Flower's FedAvg among all agents, over numbers or over outputs, which counts the bytes and tolerates no failure.

    Args:
        agents: how many there are. All take part in every round.
        way: `"average"` or `"agree"`.

    Attributes:
        sent, received: bytes of arrays that all agents together have sent and received.
    """

    def __init__(self, agents: int, way: str) -> None:
        super().__init__(
            fraction_evaluate=float(way == AGREE),
            min_train_nodes=agents,
            min_evaluate_nodes=agents * (way == AGREE),
            min_available_nodes=agents,
        )
        self.way = way
        self.sent = self.received = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        # Agents that agree have learned the mean outputs before, when they were measured.
        arrays = arrays if self.way == AVERAGE else ArrayRecord()
        return self._counted(super().configure_train(server_round, arrays, config, grid))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._counted(super().configure_evaluate(server_round, arrays, config, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        found = checked(replies, self.min_train_nodes)
        self.sent += sum(map(_bytes, found))
        return super().aggregate_train(server_round, found)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return super().aggregate_evaluate(server_round, checked(replies, self.min_evaluate_nodes))

    def _counted(self, messages: Iterable[Message]) -> list[Message]:
        found = list(messages)
        self.received += sum(map(_bytes, found))
        return found


def checked(replies: Iterable[Message], asked: int) -> list[Message]:
    """Returns replies in the order of the agents' nodes, so that sums are rounded alike in every run.

    Args:
        replies: what came back.
        asked: how many agents were asked.

    Raises:
        UserError: an agent has failed, with its reason, or has not answered in time.
    """
    found = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
    for reply in found:
        if reply.has_error():
            raise UserError(f"agent at node {reply.metadata.src_node_id}: {reply.error.reason}")
    if len(found) < asked:
        raise UserError(f"only {len(found)} of {asked} agents have answered within {_PATIENCE} seconds")
    return found


def _bytes(message: Message) -> int:
    records = message.content.array_records.values() if message.has_content() else ()
    return sum(len(array.data) for record in records for array in record.values())


class InProcess(Grid):
    """A grid whose agents are in this process, and work one after the other.

    Flower's own simulation spreads agents over processes of Ray; where one small model serves all agents, starting
    those takes longer than the training.

    Args:
        client: what runs at every agent.
        agents: how many there are.
    """

    def __init__(self, client: ClientApp, agents: int) -> None:
        self.client = client
        self.contexts = {
            node: Context(0, node, {"partition-id": number, "num-partitions": agents}, RecordDict(), {})
            for number, node in enumerate(range(1, agents + 1))
        }
        # What a message says of its sender; Flower's runtimes set it in their processes.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self.client(message, self.contexts[message.metadata.dst_node_id]) for message in messages]

    # Flower's strategies call none of the rest of a grid, which is of its runtimes' servers.

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def exchange(grid: Grid, federation: Federation, method: Method, way: str, seed: int) -> FederatedResult:
    """Runs all rounds of a federation, the server's part.

    Args:
        grid: leads to the agents.
        federation: data and base model; of the data, the server looks at the test images.
        method: what the agents train.
        way: `"average"` or `"agree"`.
        seed: of the run.

    Raises:
        UserError: agents have no samples, the same number, or numbers that do not mean the same.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    agents, rounds = federation.args.agents, federation.args.rounds
    strategy = Exchanging(agents, way)
    config = {"method": method.folder, "way": way, "seed": seed}
    _check_agents(grid, agents, config)
    server = federation.agent(method, AVERAGE, seed, 0)
    accuracy: list[float] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        server.exchange.vector = unpacked(arrays)
        accuracy.append(server.accuracy())
        return MetricRecord({"accuracy": accuracy[-1]})

    found = strategy.start(
        grid,
        packed(server.exchange.vector) if way == AVERAGE else ArrayRecord(),
        num_rounds=rounds,
        timeout=_PATIENCE,
        train_config=ConfigRecord(dict(config)),
        evaluate_config=ConfigRecord(dict(config)),
        evaluate_fn=evaluate if way == AVERAGE else None,
    )
    if way == AGREE:
        accuracy = [float(found.evaluate_metrics_clientapp[i + 1]["accuracy"]) for i in range(rounds)]  # type: ignore[arg-type]
    each = agents * rounds
    return FederatedResult(
        sent=strategy.sent // each,
        received=strategy.received // each,
        parameters=server.exchange.size,
        accuracy=accuracy[-rounds:],
        start=accuracy[0] if way == AVERAGE else None,
    )


def _check_agents(grid: Grid, agents: int, config: dict[str, Any]) -> None:
    """Asks all agents who they are, before any of them trains."""
    nodes = list(grid.get_node_ids())
    if len(nodes) < agents:
        print(f"Waiting for {agents} agents; {len(nodes)} are there", flush=True)
    while len(nodes) < agents:
        time.sleep(1)
        nodes = list(grid.get_node_ids())
    question = RecordDict({_CONFIG: ConfigRecord(dict(config))})
    asked = [Message(question, node, MessageType.QUERY) for node in nodes]
    replies = checked(grid.send_and_receive(asked, timeout=_PATIENCE), len(nodes))
    said = [reply.content.config_records[_CONFIG] for reply in replies]
    numbers = sorted(int(each["agent"]) for each in said)  # type: ignore[arg-type]
    if numbers != list(range(agents)):
        raise UserError(
            f"agents: the nodes have the partition-ids {', '.join(map(str, numbers))}, and {agents} agents need "
            f"0 to {agents - 1}, one each"
        )
    for each in said:
        if not each["samples"]:
            raise UserError(f"agent {each['agent']} has no samples; leave it out, or divide them more equally")
    if config["way"] == AVERAGE:
        names = [f"agent {each['agent']}" for each in said]
        try:
            check_agents([json.loads(str(each["means"])) for each in said], names)
        except ValueError as error:
            raise UserError(str(error)) from error
