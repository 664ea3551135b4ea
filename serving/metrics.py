"""Metrics for Prometheus: what the engine does, under the names that vLLM gave it, and HTTP by route and status.

vLLM's names are what dashboards ask for and what the Gateway API's inference extension reads unless told otherwise
(kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003-model-server-protocol). What vLLM has no name for
begins with isomesh_. No label says who asked or what: neither key, nor prompt, nor the id of a request.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from inference.requests import EngineState
from serving.service import Service
from serving.timings import Timing
from serving.watch import LINE, Record

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)  # s
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
LASTED = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
HTTP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = tuple(2**power for power in range(18))
REASONS = {"stop": "stop", "length": "length", "aborted": "abort", "error": "error"}  # ours -> vLLM's
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UNKNOWN = "none"  # the label of all paths that no route has
KINDS = ("read", "score", "decode", "encode")


class Histogram:
    """Counts in buckets, by labels. One thread writes; another may read at any time.

    Unlike prometheus_client's it takes several equal values at once, and a value costs no lock.
    """

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = (), known=((),)):
        """known: values of the labels that are there from the start, so that a first value has a rate."""
        self.name, self.help, self.bounds, self.labels = name, help, bounds, labels
        self._counts: dict[tuple[str, ...], list[int]] = {one: [0] * (len(bounds) + 1) for one in known}
        self._sums: dict[tuple[str, ...], float] = dict.fromkeys(known, 0.0)

    def observe(self, value: float, labels: tuple[str, ...] = (), times: int = 1) -> None:
        """Counts a value, so many times."""
        if labels not in self._counts:
            self._sums[labels] = 0.0
            self._counts[labels] = [0] * (len(self.bounds) + 1)
        self._counts[labels][bisect_left(self.bounds, value)] += times
        self._sums[labels] += value * times

    def family(self, names: Sequence[str] = (), values: Sequence[str] = ()) -> Metric:
        """As prometheus_client has it, with further labels that are the same for all."""
        family = HistogramMetricFamily(self.name, self.help, labels=[*names, *self.labels])
        for labels, counts in list(self._counts.items()):
            total, buckets = 0, []
            for bound, count in zip((*map(floatToGoString, self.bounds), "+Inf"), list(counts), strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric([*values, *labels], buckets, self._sums[labels])
        return family


class Metrics:
    """What a server counts. `request` is for the event loop; `first`, `gap` and `step` are for the engine's thread."""

    def __init__(self, service: Service, block: int = 0):
        """block: tokens of a block of the engine's cache, where it is known."""
        self._service, self._block = service, block
        self._requests: dict[tuple[str, str, str], int] = {}
        self._http = Histogram(
            "http_request_duration_seconds", "Until the last byte of an answer.", HTTP, ("method", "handler"), known=()
        )
        seconds = lambda name, what, bounds: Histogram(f"vllm:{name}", what, bounds)
        self._ttft = seconds("time_to_first_token_seconds", "From the queue to the first token.", TTFT)
        self._gaps = seconds("time_per_output_token_seconds", "From one token of a text to its next.", GAPS)
        self._e2e = seconds("e2e_request_latency_seconds", "From the queue to the last token.", LASTED)
        self._queue = seconds("request_queue_time_seconds", "In the queue.", LASTED)
        self._prefill = seconds("request_prefill_time_seconds", "From the queue's end to the first token.", LASTED)
        self._decode = seconds("request_decode_time_seconds", "From the first token to the last.", LASTED)
        self._prompts = seconds("request_prompt_tokens", "Tokens of the prompts of a request.", TOKENS)
        self._news = seconds("request_generation_tokens", "Tokens written for a request.", TOKENS)
        self._steps = Histogram(
            "isomesh_step_duration_seconds", "A step of the engine.", STEPS, ("kind",), [(kind,) for kind in KINDS]
        )
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    @property
    def _of_requests(self) -> tuple[Histogram, ...]:
        times = (self._ttft, self._gaps, self._e2e, self._queue, self._prefill, self._decode)
        return (*times, self._prompts, self._news)

    # -------------------------------------------------------------------------------------------------- what is told

    def first(self, seconds: float) -> None:
        """A request had its first token so long after it came into the queue."""
        self._ttft.observe(seconds)

    def gap(self, seconds: float, tokens: int) -> None:
        """So many tokens came so long after the one before."""
        self._gaps.observe(seconds, times=tokens)

    def step(self, kind: str, seconds: float, tokens: int) -> None:
        """A step of the engine ended."""
        self._steps.observe(seconds, (kind,))

    def request(self, record: Record, timings: Sequence[Timing]) -> None:
        """An HTTP request is over; `timings` are those of its parts in the engine."""
        method = record.method if record.method in METHODS else "other"
        handler = record.route or UNKNOWN
        key = (method, handler, str(record.status))
        self._requests[key] = self._requests.get(key, 0) + 1
        self._http.observe(record.seconds, (method, handler))
        for one in () if record.id.startswith(LINE) else timings:  # lines of batches wait by intent
            ended = time.monotonic() if one.ended is None else one.ended
            if one.began is not None:
                self._queue.observe(one.began - one.queued)
            if one.first is not None:
                self._prefill.observe(one.first - one.began)
                self._decode.observe(max(0.0, ended - one.first))
            if record.status == 200:
                self._e2e.observe(max(0.0, ended - one.queued))
        if timings:
            self._prompts.observe(record.prompt_tokens)
            self._news.observe(record.new_tokens)

    # ------------------------------------------------------------------------------------------------- what is answered

    def text(self) -> str:
        """Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def collect(self) -> Iterator[Metric]:
        """All metrics but those of the process, as prometheus_client asks for them."""
        names, values = ["model_name"], [self._service.name]
        state = self._service.engine.state()
        yield from self._engine(state, names, values)
        for histogram in self._of_requests:
            yield histogram.family(names, values)
        gaps = self._gaps.family(names, values)  # vLLM's newer name of the same
        gaps.name = "vllm:inter_token_latency_seconds"
        gaps.samples = [s._replace(name=s.name.replace(self._gaps.name, gaps.name)) for s in gaps.samples]
        yield gaps
        yield self._steps.family(names, values)
        requests = CounterMetricFamily("http_requests", "Answers.", labels=["method", "handler", "status"])
        for key, count in list(self._requests.items()):
            requests.add_metric(key, count)
        yield requests
        yield self._http.family()

    def _engine(self, state: EngineState, names: list[str], values: list[str]) -> Iterator[Metric]:
        def gauge(name: str, help: str, value: float) -> Metric:
            family = GaugeMetricFamily(name, help, labels=names)
            family.add_metric(values, value)
            return family

        def counter(name: str, help: str, value: float) -> Metric:
            family = CounterMetricFamily(name, help, labels=names)
            family.add_metric(values, value)
            return family

        usage = state.blocks_used / state.blocks if state.blocks else 0.0
        yield gauge("vllm:num_requests_waiting", "Choices that have not begun or were preempted.", state.waiting)
        yield gauge("vllm:num_requests_running", "Choices that run.", state.running)
        yield gauge("vllm:kv_cache_usage_perc", "Share of the cache's blocks that running choices hold.", usage)
        yield gauge("vllm:gpu_cache_usage_perc", "vLLM's older name of vllm:kv_cache_usage_perc.", usage)
        yield counter("vllm:num_preemptions", "Choices that lost their blocks and began anew.", state.preemptions)
        yield counter("vllm:prompt_tokens", "Tokens of prompts, those found in the cache too.", state.prompt_tokens)
        yield counter("vllm:generation_tokens", "Tokens that were written.", state.generated_tokens)
        yield counter("vllm:prefix_cache_queries", "Tokens of prompts, looked up in the cache.", state.prompt_tokens)
        yield counter("vllm:prefix_cache_hits", "Of these, found there.", state.cached_prompt_tokens)
        yield counter("vllm:spec_decode_num_draft_tokens", "Tokens that speculation proposed.", state.drafted_tokens)
        yield counter("vllm:spec_decode_num_accepted_tokens", "Of these, accepted.", state.accepted_tokens)
        finished = CounterMetricFamily(
            "vllm:request_success", "Choices that ended.", labels=[*names, "finished_reason"]
        )
        for finish, reason in REASONS.items():
            finished.add_metric([*values, reason], state.finished.get(finish, 0))
        yield finished
        sizes = {"block_size": str(self._block), "num_gpu_blocks": str(state.blocks)}
        cache = GaugeMetricFamily("vllm:cache_config_info", "How the cache is cut.", labels=[*names, *sizes])
        cache.add_metric([*values, *sizes.values()], 1)
        yield cache
        yield gauge(
            "isomesh_cached_blocks", "Free blocks that hold a prefix for whoever asks next.", state.blocks_cached
        )
        yield counter("isomesh_compiles_after_warm_up", "Programs compiled while serving: to be 0.", state.compiles)
        yield counter("isomesh_steps", "Steps of the engine.", state.steps)
        yield gauge("isomesh_ready", "1 if the next request would be served.", self._service.ready is None)
        yield gauge("isomesh_draining", "1 if nothing new is taken.", state.draining)
        silent = time.monotonic() - state.beat
        yield gauge("isomesh_step_loop_silent_seconds", "Since the last turn of the engine's loop.", silent)
        yield from self._adapters(state, names, values)
        weights = GaugeMetricFamily("isomesh_weights_info", "What is served.", labels=[*names, "digest"])
        weights.add_metric([*values, self._service.digest[:16]], 1)
        yield weights

    def _adapters(self, state: EngineState, names: list[str], values: list[str]) -> Iterator[Metric]:
        """Of those that are there: as many label values as there are places."""
        if not (places := self._service.engine.adapters.count):
            return
        told = lambda what: ",".join(name for name, one in sorted(state.adapters.items()) if getattr(one, what))
        labels = {"max_lora": str(places), "waiting_lora_adapters": told("waiting")}
        labels["running_lora_adapters"] = told("running")
        lora = GaugeMetricFamily("vllm:lora_requests_info", "Adapters with requests, and when.", labels=list(labels))
        lora.add_metric(list(labels.values()), time.time())
        yield lora
        now = GaugeMetricFamily("isomesh_adapter_choices", "Of each adapter.", labels=[*names, "adapter", "state"])
        ended = CounterMetricFamily(
            "isomesh_adapter_choices_ended", "Since the adapter was loaded.", labels=[*names, "adapter"]
        )
        for name, one in sorted(state.adapters.items()):
            now.add_metric([*values, name, "waiting"], one.waiting)
            now.add_metric([*values, name, "running"], one.running)
            ended.add_metric([*values, name], one.ended)
        yield now
        yield ended
