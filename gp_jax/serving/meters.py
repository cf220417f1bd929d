"""What a server counts, in Prometheus' form: the names that dashboards for vLLM read, and what only pruning has."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gp_jax.serving.jobs import Job, Started
from gp_jax.serving.pools import Pools
from gp_jax.serving.vision_cache import VisionCache

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
REASONS = ("stop", "length", "abort", "error", "timeout")


class Meters:
    """Counters of one server. `label` is the model's name."""

    def __init__(self, model: str):
        self.registry, self.model = CollectorRegistry(), model
        self.request_seconds = 1.0  # of the last requests, on average
        self.own: dict[str, Any] = {}

        def add(kind: Any, name: str, text: str, *more: str, **options: Any) -> Any:
            made = kind(name, text, ("model_name", *more), registry=self.registry, **options)
            self.own[name] = made if more else made.labels(model)
            return self.own[name]

        add(Gauge, "vllm:num_requests_running", "Requests that are being answered.")
        add(Gauge, "vllm:num_requests_waiting", "Requests that wait, or whose prompt is being read.")
        add(Gauge, "vllm:kv_cache_usage_perc", "Share of the caches' memory that is used; 1 is all of it.")
        add(Counter, "vllm:prompt_tokens", "Prompt tokens, visual ones included.")
        add(Counter, "vllm:generation_tokens", "Generated tokens.")
        finished = add(Counter, "vllm:request_success", "Requests that have ended, by reason.", "finished_reason")
        self.finished = {reason: finished.labels(model, reason) for reason in REASONS}
        for name, text in (
            ("time_to_first_token_seconds", "From the request to its first token."),
            ("inter_token_latency_seconds", "Between two deliveries, per token."),
            ("e2e_request_latency_seconds", "From the request to its end."),
            ("request_queue_time_seconds", "From the request to the begin of its prefill."),
            ("request_prefill_time_seconds", "From the begin of the prefill to the first token."),
            ("request_decode_time_seconds", "From the first token to the last."),
        ):
            add(Histogram, f"vllm:{name}", text, buckets=SECONDS)
        add(Histogram, "vllm:request_prompt_tokens", "Prompt tokens of a request.", buckets=LENGTHS)
        add(Histogram, "vllm:request_generation_tokens", "Generated tokens of a request.", buckets=LENGTHS)
        add(Counter, "gp_jax:visual_tokens", "Visual tokens of prompts.")
        add(Counter, "gp_jax:kept_visual_tokens", "Visual tokens that were kept.")
        add(Histogram, "gp_jax:kept_share", "Share of a request's visual tokens that was kept.", buckets=SHARES)
        add(Counter, "gp_jax:vision_cache_hits", "Pictures that were in the vision cache.")
        add(Counter, "gp_jax:vision_cache_queries", "Pictures that were looked for in the vision cache.")
        add(Gauge, "gp_jax:vision_cache_bytes", "Bytes of the vision cache.")
        add(Gauge, "gp_jax:kv_cache_bytes", "Bytes of all pools.")
        stages = add(Gauge, "gp_jax:stage_seconds", "Seconds of the answering thread, by stage.", "stage")
        self.stages = {name: stages.labels(model, name) for name in ("look", "vision", "prefill", "decode", "host")}
        places = add(Gauge, "gp_jax:pool_places", "Places of a pool, by capacity.", "capacity")
        taken = add(Gauge, "gp_jax:pool_running", "Places of a pool that are taken, by capacity.", "capacity")
        self.pool = lambda capacity: (places.labels(model, capacity), taken.labels(model, capacity))

    def state(self, waiting: int, pools: Pools, cache: VisionCache, seconds: dict[str, float]) -> None:
        """How things stand."""
        own = self.own
        own["vllm:num_requests_running"].set(pools.running)
        own["vllm:num_requests_waiting"].set(waiting)
        own["vllm:kv_cache_usage_perc"].set(pools.used / pools.budget)
        own["gp_jax:vision_cache_bytes"].set(cache.held)
        own["gp_jax:kv_cache_bytes"].set(pools.held)
        for name, value in seconds.items():
            self.stages[name].set(value)
        for pool in pools:
            places, taken = self.pool(pool.capacity)
            places.set(pool.size)
            taken.set(len(pool.running))

    def started(self, job: Job, started: Started) -> None:
        """A prompt was read."""
        own, total, kept = self.own, started.keep.size, int(started.keep.sum())
        own["vllm:prompt_tokens"].inc(job.sample.ids.size)
        own["vllm:request_prompt_tokens"].observe(job.sample.ids.size)
        own["vllm:request_queue_time_seconds"].observe(job.times["begun"] - job.times["arrived"])
        own["gp_jax:visual_tokens"].inc(total)
        own["gp_jax:kept_visual_tokens"].inc(kept)
        own["gp_jax:vision_cache_hits"].inc(started.seen_before)
        own["gp_jax:vision_cache_queries"].inc(started.pictures)
        if total:
            own["gp_jax:kept_share"].observe(kept / total)

    def tokens(self, job: Job, count: int) -> None:
        """New tokens of a request."""
        own, now = self.own, time.monotonic()
        own["vllm:generation_tokens"].inc(count)
        if "first" in job.times:
            own["vllm:inter_token_latency_seconds"].observe((now - job.times["last"]) / count)
        else:
            job.times["first"] = now
            own["vllm:time_to_first_token_seconds"].observe(now - job.times["arrived"])
            own["vllm:request_prefill_time_seconds"].observe(now - job.times["begun"])
        job.times["last"] = now

    def ended(self, job: Job, reason: str) -> None:
        """A request has ended."""
        self.finished[reason].inc()
        if reason in ("stop", "length"):
            own, now = self.own, time.monotonic()
            own["vllm:e2e_request_latency_seconds"].observe(now - job.times["arrived"])
            own["vllm:request_decode_time_seconds"].observe(now - job.times["first"])
            own["vllm:request_generation_tokens"].observe(job.sent)
            self.request_seconds = 0.9 * self.request_seconds + 0.1 * (now - job.times["arrived"])

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
