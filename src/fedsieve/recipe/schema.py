"""The tables of a recipe: every key, its default and its limits.

recipe.py reads them from a file; docs/recipes.md describes the keys.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    Tag,
    model_validator,
)

from fedsieve.algebra.budget import refuse_rank
from fedsieve.data.names import clean, numbered
from fedsieve.errors import FedSieveError
from fedsieve.settings import (
    PAPER_RATIOS,
    Dtype,
    Kind,
    NotNegative,
    Positive,
    Quantization,
    Sampling,
    Share,
    Source,
    Table,
)
from fedsieve.settings import Lora as Lora  # users of the schema find them here
from fedsieve.settings import Training as Training
from fedsieve.tasks import catalogue


def _task(name: str) -> str:
    try:
        return catalogue.known(name)
    except FedSieveError as error:
        raise ValueError(str(error)) from None


class Model(Table):
    """The pretrained model: a hub name, a folder, or a name that `fedsieve fetch` knows.

    quantization: of the frozen weights (train/quantise.py), whose products are taken in `dtype`
    double_quantization: of nf4: its scales are rounded too
    settings: changes to the model's configuration, such as its dropout rates
    """

    source: str
    task: Annotated[str, AfterValidator(_task)] = "classification"
    dtype: Dtype = "float32"
    quantization: Quantization = "none"
    double_quantization: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _no_code(cls, given: Any) -> Any:
        for key in _keys_anywhere(given):
            if key in _CODE:
                raise ValueError(
                    f"{key}: a recipe cannot say that foreign code is run: whoever trusts the "
                    "model's gives --trust-remote-code on the command line"
                )
        return given

    @model_validator(mode="after")
    def _settings_that_a_configuration_holds(self) -> "Model":
        for key, value in _values_anywhere(self.settings, "settings"):
            odd = isinstance(value, float) and not math.isfinite(value)
            if odd or not isinstance(value, bool | int | float | str):
                raise ValueError(_NO_SETTING.format(key, value))
        return self

    @model_validator(mode="after")
    def _double_of_nf4(self) -> "Model":
        if self.double_quantization and self.quantization != "nf4":
            raise ValueError(
                "double_quantization: it rounds the scales of nf4, and quantization is "
                f"{self.quantization!r}"
            )
        return self


# What would have transformers run what a model's folder or the hub holds as code.
_CODE = frozenset({"trust_remote_code", "auto_map", "code_revision", "use_kernels", "custom_code"})


_NO_SETTING = (
    "{}: {} is nothing that a model's configuration holds: give a text, a finite number, true or "
    "false, or lists and tables of them"
)


def _values_anywhere(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """What is in a table, tables and lists aside, and the dotted key that it has."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _values_anywhere(each, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _values_anywhere(each, key)
    else:
        yield key, value


def _keys_anywhere(value: Any) -> Iterator[str]:
    """The keys of a table and of all that is in it."""
    if isinstance(value, Mapping):
        yield from (str(key) for key in value)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _keys_anywhere(each)


class MoreTest(Table):
    """Rows to evaluate on beside the test rows. test, test_split: as in Data; test defaults to its

    A text alone is a split, or a file by its ending.
    """

    test: str | None = None
    test_split: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, given: Any) -> Any:
        return {"test_split": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _says_which(self) -> "MoreTest":
        if self.test is None and self.test_split is None:
            raise ValueError("give test, test_split, or both")
        return self


# The beginnings of metrics' names.
_Prefix = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,15}$")]


# Of [data], what says how rows are read, and so is one for all sites of a federation. Which rows
# and columns those are, each machine says for itself.
READ_AS = (
    *("classes", "max_length", "validation"),
    *("option_word", "answer", "first_option", "new_tokens", "stop"),
)


class Data(Table):
    """Rows to train and to evaluate on, and the columns that matter.

    set: a name of sets.toml, which stands for what the recipe does not say of the rest; filled in,
        and gone, when a recipe is read
    train, test: a hub data set, a file, a folder, or a fetched name; test defaults to train's
    more_tests: by name, other rows that are evaluated on beside them
    names, separator: for CSV and TSV files without a header line, or with another separator
    field: for JSON files that are one object: the key under which the rows lie
    classes: the labels in the order of the model's outputs; by default those that train holds
    options, option_word, answer, first_option: of multiple choice (docs/tasks.md)
    new_tokens, stop: how long a written answer may be, and the texts that end one
    validation: share of train's rows that no client gets; the same rows whatever the seed
    """

    set: str | None = None
    train: str
    test: str | None = None
    config: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    more_tests: Annotated[dict[_Prefix, MoreTest], Field(max_length=8)] | None = None
    names: tuple[str, ...] | None = None
    separator: str | None = None
    field: str | None = None
    text: str | None = None
    text_b: str | None = None
    image: str | None = None
    label: str | tuple[str, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    classes: tuple[Annotated[str, AfterValidator(clean)], ...] | None = None
    max_length: Positive = 128
    options: str | tuple[str, ...] | None = None
    option_word: Annotated[str, Field(pattern=r"^[A-Za-z]{1,30}$")] | None = None
    answer: Annotated[str, Field(max_length=200)] | None = None
    first_option: NotNegative = 0
    new_tokens: Positive = 32
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=100)], ...], Field(max_length=16)
    ] = ()
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "Data":
        if self.more_tests and self.test is None and self.test_split is None:
            raise ValueError("more_tests: they stand beside the rows of test or test_split")
        if twice := [name for name, times in Counter(self.classes or ()).items() if times > 1]:
            raise ValueError(f"classes: {twice[0][:40]!r} is there twice")
        return self


class Partition(Table):
    """Which rows go to which client.

    dirichlet: each label's rows are divided over `clients` clients with concentration `alpha`
    dirichlet-by-client: `clients` clients of equal size, each with its own mixture of labels, drawn
        with concentration `alpha`
    iid: `clients` equal parts at random; column: one client for each value of `column`
    by: of the two dirichlets: a column whose values take the place of the labels
    """

    kind: Literal["dirichlet", "dirichlet-by-client", "iid", "column"]
    clients: Positive | None = None
    alpha: PositiveFloat | None = None
    column: str | None = None
    by: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> "Partition":
        needs = {"iid": ("clients",), "column": ("column",)}.get(self.kind, ("clients", "alpha"))
        for key in ("clients", "alpha", "column"):
            given = getattr(self, key) is not None
            if given != (key in needs):
                verb = "does not use" if given else "needs"
                raise ValueError(f"a partition of kind {self.kind!r} {verb} {key!r}")
        if self.by is not None and self.alpha is None:
            raise ValueError(f"a partition of kind {self.kind!r} does not use 'by'")
        return self

    @property
    def reads(self) -> str | None:
        """The column of the rows that it takes into account, beside their labels."""
        return self.column or self.by


class Tier(Table):
    """A kind of client: its share of all clients and what it can afford (see budget.Budget)."""

    share: Annotated[PositiveFloat, Field(le=1e6)] = 1.0
    ratio: Share = 1.0
    down: Share = 1.0
    up: Share = 1.0


class Limits(Table):
    """What one client can afford: its ranks as a share of the server's or in number, densities."""

    ratio: Share | None = None
    rank: Positive | None = None
    down: Share = 1.0
    up: Share = 1.0

    @model_validator(mode="after")
    def _one_of_both(self) -> "Limits":
        if self.ratio is not None and self.rank is not None:
            raise ValueError("give ratio or rank, not both")
        return self


def _by_id(value: Any) -> str:
    return "by id" if isinstance(value, Mapping) else "in order"


class ListBudgets(Table):
    """A budget for each client: by its id, or in order of id."""

    kind: Literal["list"]
    clients: Annotated[
        Annotated[dict[str, Limits], Tag("by id")] | Annotated[tuple[Limits, ...], Tag("in order")],
        Discriminator(_by_id),
    ]


class TierBudgets(Table):
    """FLASC's tiers (budget.tiers_by_rank and budget.tiers_by_density).

    by: what the tiers differ in; by default the rank if the method uses it, else the density
    """

    kind: Literal["tiers"]
    tiers: Annotated[int, Field(gt=0, le=1000)]
    by: Literal["rank", "density"] | None = None


class RatioBudgets(Table):
    """A ratio for each client, drawn uniformly from a set; by default FSLoRA's."""

    kind: Literal["ratios"]
    ratios: Annotated[tuple[Share, ...], Field(min_length=1)] = PAPER_RATIOS
    down: Share = 1.0
    up: Share = 1.0


class RankLaw(Table):
    """A rank for each client from one of FSLoRA's laws on [low, high]; see budget.py."""

    kind: Literal["normal", "heavy-tail"]
    low: Positive
    high: Positive
    down: Share = 1.0
    up: Share = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> "RankLaw":
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, above high, which is {self.high}")
        return self


class Machine(Table):
    """What a client has (resources.Resources): MB, Mbit/s, seconds. share: of a tier of such."""

    share: Annotated[PositiveFloat, Field(le=1e6)] = 1.0
    memory: PositiveFloat
    downlink: PositiveFloat
    uplink: PositiveFloat
    latency: NonNegativeFloat = 0.0
    step_seconds: NonNegativeFloat


class ResourceBudgets(Table):
    """Budgets that keep each client's round under a deadline; see resources.py.

    deadline: seconds; least: the smallest density that may be chosen
    """

    kind: Literal["resources"]
    deadline: PositiveFloat
    least: Share = 1 / 64
    tiers: tuple[Machine, ...] | None = None
    clients: dict[str, Machine] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "ResourceBudgets":
        if bool(self.tiers) == bool(self.clients):
            raise ValueError("give the machines as tiers or as clients (by id): one of the two")
        return self


_BUDGETS: dict[str, type[Table]] = {
    "shares": Tier,
    "list": ListBudgets,
    "tiers": TierBudgets,
    "ratios": RatioBudgets,
    "normal": RankLaw,
    "heavy-tail": RankLaw,
    "resources": ResourceBudgets,
}


def _kind_of_budgets(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("kind"))
    return str(getattr(value, "kind", "shares"))


Budgets = Annotated[
    Annotated[tuple[Tier, ...], Field(min_length=1), Tag("shares")]
    | Annotated[ListBudgets, Tag("list")]
    | Annotated[TierBudgets, Tag("tiers")]
    | Annotated[RatioBudgets, Tag("ratios")]
    | Annotated[RankLaw, Tag("normal")]
    | Annotated[RankLaw, Tag("heavy-tail")]
    | Annotated[ResourceBudgets, Tag("resources")],
    Discriminator(
        _kind_of_budgets,
        custom_error_type="budgets",
        custom_error_message="a list of tiers is needed, or a table whose kind is "
        + ", ".join(repr(kind) for kind in _BUDGETS if kind != "shares"),
    ),
]


class SamplingTable(Table):
    """Who takes part in a round (sampling.Sampling); its size is the recipe's `cohort`."""

    kind: Kind = "uniform"
    availability: float | dict[str, float] = 1.0
    extra: NotNegative = 0
    quorum: NotNegative = 0


class MethodTable(BaseModel):
    """The method's name; its options stand beside it and are checked against its signature."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str


ServerName = Literal["sgd", "adam", "fedadam"]
SERVERS: tuple[ServerName, ...] = get_args(ServerName)


class ServerTable(Table):
    """The server optimizer's name; its parameters stand beside it.

    optimizer: None is the method's own, with what stands beside it changed
    decay: its learning rate is multiplied by this after every round
    clip: the L2 norm to which a client's update is scaled down; none by default. No privacy
    norm_bound: an update whose L2 norm is so many times the median of its round's is left out;
        "none" leaves none out. None is 100, or "none" where the server clips
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    optimizer: ServerName | None = None
    decay: Share = 1.0
    clip: PositiveFloat | None = None
    norm_bound: Annotated[float, Field(ge=1)] | Literal["none"] | None = None


class Privacy(Table):
    """Client-level differential privacy with a trusted server; see privacy.py and docs/privacy.md.

    clip: the L2 norm to which a client's update is scaled down
    epsilon, delta: the target; epsilon alone finds the noise for all rounds
    noise_multiplier: the noise on the sum of updates over clip; with epsilon too, the run ends
        before the round that would pass it
    simulated_cohort, simulated_population: noise as if so many of so many clients took part
    noise_from: "seed" repeats with the recipe, for simulation; "system" is what deployments need
    quantile, clip_rate, count_noise: a clip that follows this quantile of the updates' norms
    """

    clip: Annotated[float, Field(gt=0, allow_inf_nan=True)]  # without noise it may be inf
    delta: Annotated[float, Field(gt=0, lt=1)]
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    noise_multiplier: Annotated[float, Field(ge=0, le=1e6)] | None = None
    simulated_cohort: Positive | None = None
    simulated_population: Positive | None = None
    noise_from: Source = "seed"
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip_rate: PositiveFloat = 0.2
    count_noise: PositiveFloat | None = None

    @model_validator(mode="after")
    def _complete(self) -> "Privacy":
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("give 'epsilon', 'noise_multiplier', or both")
        return self


class Evaluation(Table):
    """every: rounds between evaluations (the last round is always evaluated)

    on: "validation" takes the rows that data.validation holds back; the test rows are not read
    metric: which of the task's metrics leads; None is the task's own
    limit: evaluate on the first so many rows, after a shuffle by the seed; None takes all
    by_client: the rows that are evaluated have the partition's column too, and the scores of each
        client's own are told
    """

    on: Literal["test", "validation"] = "test"
    every: Positive = 1
    batch: Positive = 64
    metric: str | None = None
    limit: Positive | None = None
    by_client: bool = False


class Checkpoint(Table):
    """every: rounds between checkpoints (the last round always leaves one)."""

    every: Positive = 1


class Engine(Table):
    """Where a round's clients run, and how many at once. What comes out is the same to the bit with
    as many threads, but for `together`: so any engine may go on with a run.

    kind: in this process one after another, in worker processes of this machine, or on a cluster
    workers: how many; "auto" is one a device, or on CPUs as many as cores and threads allow
    threads: torch's threads a worker; None shares this process's own out
    devices: of the workers, in turn; None is the recipe's `device`. On a cluster one kind of device
    address: of the cluster, as Ray has it; None is what Ray finds by itself
    together: so many clients of a cohort are trained in one pass: the same but for rounding, and
        other masks where there is dropout; "auto" measures whether that is faster
    """

    kind: Literal["process", "processes", "ray"] = "process"
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    devices: Annotated[tuple[str, ...], Field(min_length=1, max_length=1024)] | None = None
    address: str | None = None
    together: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = 1

    @model_validator(mode="after")
    def _of_this_kind(self) -> "Engine":
        if self.kind != "process" and self.together != 1:
            raise ValueError(
                f"together: workers of an engine of kind {self.kind!r} train one client at a time: "
                "leave it out, or take kind 'process'"
            )
        if self.kind == "process":
            for key in ("workers", "threads", "devices"):
                if getattr(self, key) not in ("auto", None):
                    raise ValueError(
                        f"{key}: an engine of kind 'process' has no workers: give kind "
                        "'processes' or 'ray'"
                    )
        if self.kind != "ray" and self.address is not None:
            raise ValueError(f"address: an engine of kind {self.kind!r} has none: it is for 'ray'")
        if self.kind == "ray" and len(self.devices or ()) > 1:
            raise ValueError(
                "devices: on a cluster Ray chooses each worker's device: name one kind, 'cuda' or "
                "'cpu'"
            )
        return self


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Tracking(Table):
    """By what a run's rounds are tracked (run/tracking.py). Where that is no recipe says: the
    user's own settings of the tracker do.

    project: what the run is among there; TensorBoard has none
    """

    kind: Tracker
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,99}$")] = "fedsieve"


LONGEST_NAME = 200  # letters of a recipe's own


def _shown(name: str) -> str:
    """A recipe's name is told before a run begins, and the recipe may be somebody else's."""
    if not name.isprintable():
        raise ValueError("a name holds printable characters, on one line")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name has at most {LONGEST_NAME} letters, and this one {len(name):,}")
    return name


class Recipe(Table):
    """A whole experiment.

    strict: a client whose rows cannot be used stops the run; else it is left out with a warning
    """

    name: Annotated[str, AfterValidator(_shown)] = "run"
    seed: NotNegative = 0
    rounds: Positive
    cohort: Positive
    device: str = "auto"
    strict: bool = False
    model: Model
    lora: Lora = Lora()
    data: Data
    partition: Partition
    budgets: Budgets = (Tier(),)
    sampling: SamplingTable = SamplingTable()
    method: MethodTable
    server: ServerTable = ServerTable()
    privacy: Privacy | None = None
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    engine: Engine = Engine()
    tracking: Tracking | None = None

    @model_validator(mode="after")
    def _has_validation_rows(self) -> "Recipe":
        if self.evaluation.on == "validation" and self.data.validation is None:
            raise ValueError(
                "evaluation.on: 'validation' needs data.validation, the share of the training "
                "rows to hold back (0.1, say)"
            )
        return self

    @model_validator(mode="after")
    def _one_at_a_time_by_a_function(self) -> "Recipe":
        if self.training.function is not None and self.engine.together != 1:
            raise ValueError(
                "engine.together: training.function trains one client at a time: leave one of the "
                "two out"
            )
        return self

    @model_validator(mode="after")
    def _ranks_that_the_server_has(self) -> "Recipe":
        rank = self.lora.rank
        if isinstance(self.budgets, ListBudgets):
            for id, limits in limits_by_id(self.budgets).items():
                refuse_rank(id, limits.rank or 1, rank)
        if isinstance(self.budgets, RankLaw) and self.budgets.high > rank:
            raise ValueError(
                f"budgets.high: clients of rank {self.budgets.high} are above the server's {rank}: "
                "lower it or raise lora.rank"
            )
        return self

    @model_validator(mode="after")
    def _sampling_that_can_be(self) -> "Recipe":
        sampling(self)  # raises if it cannot
        if self.sampling.extra and not isinstance(self.budgets, ResourceBudgets):
            raise ValueError(
                "sampling.extra: who is late follows from each client's link and seconds a step: "
                "give them in budgets of kind 'resources', or leave extra out"
            )
        return self


def sampling(recipe: Recipe) -> Sampling:
    """The sampling that the recipe's `cohort` and its [sampling] table describe."""
    return Sampling(size=recipe.cohort, **recipe.sampling.model_dump())


def deployed(recipe: Recipe) -> bool:
    """Whether the run protects real clients: its noise is fresh, and its server has secrets."""
    return recipe.privacy is not None and recipe.privacy.noise_from == "system"


def limits_by_id(budgets: ListBudgets) -> dict[str, Limits]:
    """The listed limits by id; a list in order is taken to be of the ids "0000", "0001", ..."""
    if isinstance(budgets.clients, dict):
        return budgets.clients
    return dict(zip(numbered(len(budgets.clients)), budgets.clients, strict=True))


def path_of(loc: Sequence[str | int]) -> list[str]:
    """The steps to a place as a user writes them: without the tags of unions."""
    path = [str(step) for step in loc]
    if path[:1] == ["budgets"]:
        tag = path[1:2]
        del path[1:2]
        if tag == ["list"] and path[1:2] == ["clients"]:
            del path[2:3]
    elif _TAG.fullmatch("".join(path[2:3])) and (len(path) == 3 or "[" in path[2]):
        del path[2]
    return path


# What pydantic calls one of several types that a key may have: `server.norm_bound.literal['none']`.
_TAG = re.compile(r"constrained-\w+|(literal|tuple|list|dict)\[.*\]|str|int|float|bool")


def keys_of(path: Sequence[str | int]) -> list[str]:
    """The keys of the table at a place of the recipe."""
    table: Any = Recipe
    for place, step in enumerate(path):
        if path[0] == "budgets" and place == 1 and step in _BUDGETS:
            table = _BUDGETS[str(step)]
        elif step in table.__pydantic_fields__:
            table = _table_in(table.__pydantic_fields__[step].annotation) or table
    return list(table.__pydantic_fields__)


def _table_in(annotation: Any) -> Any:
    """The first table that an annotation names, in whatever list, union or dict."""
    if hasattr(annotation, "__pydantic_fields__"):
        return annotation
    found = (_table_in(inner) for inner in get_args(annotation))
    return next((table for table in found if table is not None), None)
