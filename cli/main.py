"""The `baton` command. Each subcommand imports what it needs, so that all of them start quickly."""

from pathlib import Path
from typing import Annotated

import typer

from baton.cli import chat_command, cluster_commands, identity_commands
from baton.cli.console import WIDTH, errors_shown, make_console

app = typer.Typer(
    name="baton",
    help="Serve large language models with prefill and decode in separate processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)

_MODEL = typer.Option(
    "--model",
    metavar="[NAME[,ALIAS…]=]DIR",
    help="A Hugging Face checkpoint folder, and its names; once for each. By default the demo"
    " model.",
)


@app.command()
def serve(
    *,
    model: Annotated[list[str] | None, _MODEL] = None,
    name: Annotated[
        str, typer.Option(help="The name of a single model; by default the folder's.")
    ] = "",
    prefill: Annotated[
        int, typer.Option(help="Prefill instances of each model; 0: decode does both.")
    ] = 1,
    decode: Annotated[int, typer.Option(help="Decode instances of each model.")] = 1,
    host: Annotated[str, typer.Option(help="Address of the APIs.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the HTTP API; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Of the gRPC API; 0 takes a free one.")] = 8001,
    prefill_tp: Annotated[
        int, typer.Option(help="Ranks over which each matrix of a prefill instance is split.")
    ] = 1,
    prefill_pp: Annotated[int, typer.Option(help="Stages of layers of a prefill instance.")] = 1,
    prefill_dp: Annotated[
        int, typer.Option(help="Copies of the model over which a prefill instance spreads prompts.")
    ] = 1,
    prefill_ep: Annotated[
        int, typer.Option(help="Places over which a prefill instance spreads experts.")
    ] = 1,
    prefill_cp: Annotated[
        int, typer.Option(help="Ranks over which a prefill instance spreads a long prompt.")
    ] = 1,
    decode_tp: Annotated[
        int, typer.Option(help="Ranks over which each matrix of a decode instance is split.")
    ] = 1,
    decode_pp: Annotated[int, typer.Option(help="Stages of layers of a decode instance.")] = 1,
    decode_dp: Annotated[
        int, typer.Option(help="Copies of the model over which a decode instance spreads requests.")
    ] = 1,
    decode_ep: Annotated[
        int, typer.Option(help="Places over which a decode instance spreads experts.")
    ] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads per rank.")] = 1,
    device: Annotated[
        str, typer.Option(help="Where models run: cpu, cuda, or auto: a GPU if there is one.")
    ] = "auto",
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory that an instance may take.")
    ] = 0.9,
    executor: Annotated[
        str, typer.Option(help="Who computes: native, torch, or auto: native if it can be had.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="What to compute in, and the KV: float32 or bfloat16.")
    ] = "float32",
    prefill_kv_dtype: Annotated[
        str | None, typer.Option(help="What prefill keeps KV as: float32 or bfloat16.")
    ] = None,
    decode_kv_dtype: Annotated[
        str | None, typer.Option(help="What decode keeps KV as; converted when handed over.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option(help="Bitwise the same logits in any batch, or refuse to start.")
    ] = False,
    kv_memory_mib: Annotated[
        int | None,
        typer.Option(help="KV memory per rank, in MiB; by default 256, on a GPU what is left."),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block: 8, 16 or 32.")] = 16,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and output; by default the model's.")
    ] = None,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens computed in one step.")] = 512,
    max_sequences: Annotated[int, typer.Option(help="Sequences in one step.")] = 64,
    policy: Annotated[
        str, typer.Option(help="Who is served first: fcfs, priority or sjf.")
    ] = "fcfs",
    prefix_cache: Annotated[
        bool, typer.Option(help="Keep KV for prompts that begin alike.")
    ] = True,
    host_memory_mib: Annotated[
        int, typer.Option(help="Host memory for preempted sequences' KV, in MiB; 0: compute again.")
    ] = 0,
    local_prefill: Annotated[
        str, typer.Option(help="Decode computes prompts itself: auto (if cheaper) or fallback.")
    ] = "auto",
    backup: Annotated[
        str, typer.Option(help="Decode instances copy KV to one another: off or peer.")
    ] = "off",
    max_open_requests: Annotated[
        int, typer.Option(help="Of each model at instances; more wait.")
    ] = 256,
    tool_parser: Annotated[
        str, typer.Option(help="How the model writes tool calls: hermes, llama3_json or mistral.")
    ] = "auto",
    start_timeout: Annotated[float, typer.Option(help="Seconds for instances to start.")] = 180.0,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of tenants and API keys; without it anybody may call.")
    ] = None,
    open_metrics: Annotated[
        bool, typer.Option(help="Show /metrics to those without a key too.")
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate of both APIs; with it they speak TLS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Authority of whom clients must show a certificate.")
    ] = None,
    cluster_certs: Annotated[
        Path | None,
        typer.Option(help="Folder with certificates between processes: see `baton certs`."),
    ] = None,
    otlp_endpoint: Annotated[
        str, typer.Option(help="http://host:port of an OpenTelemetry collector, for spans.")
    ] = "",
    log_format: Annotated[
        str, typer.Option(help="Of log lines: json, text, or auto: text on a terminal.")
    ] = "auto",
    log_level: Annotated[
        str, typer.Option(help="Log lines to show: debug, info, warning or error, and above.")
    ] = "info",
) -> None:
    """Serve models by the OpenAI HTTP API and by gRPC, until Ctrl-C."""
    from baton.cli.model_options import models_of
    from baton.cli.serve import serve as run
    from baton.cli.stopping import Stopping
    from baton.cli.tls import cluster_tls, tls_of
    from baton.core import log
    from baton.core.config import (
        ClusterConfig,
        EngineConfig,
        GatewayConfig,
        HandoverConfig,
        ParallelConfig,
    )

    with errors_shown():
        log.choose(form=log_format, level=log_level)
        log.configure()
        first, *beside = models_of(model or (), name)
        config = ClusterConfig.checked(
            model_dir=first.dir,
            model_name=first.name,
            aliases=first.aliases,
            beside=tuple(beside),
            prefill=prefill,
            decode=decode,
            prefill_parallel=ParallelConfig.checked(
                tp=prefill_tp, pp=prefill_pp, dp=prefill_dp, ep=prefill_ep, cp=prefill_cp
            ),
            decode_parallel=ParallelConfig.checked(
                tp=decode_tp, pp=decode_pp, dp=decode_dp, ep=decode_ep
            ),
            prefill_kv_dtype=prefill_kv_dtype,
            decode_kv_dtype=decode_kv_dtype,
            threads=threads,
            start_timeout_s=start_timeout,
            engine=EngineConfig.checked(
                device=device,
                gpu_memory_utilization=gpu_memory_utilization,
                executor=executor,
                dtype=dtype,
                batch_invariant=batch_invariant,
                kv_memory_mib=kv_memory_mib,
                block_size=block_size,
                max_model_len=max_model_len,
                max_batch_tokens=max_batch_tokens,
                max_sequences=max_sequences,
                policy=policy,
                prefix_cache=prefix_cache,
                host_memory_mib=host_memory_mib,
            ),
            handover=HandoverConfig.checked(local_prefill=local_prefill, backup=backup),
            gateway=GatewayConfig.checked(
                host=host,
                http_port=port,
                grpc_port=grpc_port,
                max_open_requests=max_open_requests,
                tool_parser=tool_parser,
                api_keys=api_keys,
                open_metrics=open_metrics,
                tls=tls_of(tls_cert, tls_key, tls_client_ca),
                otlp_endpoint=otlp_endpoint,
            ),
            tls=cluster_tls(cluster_certs),
        )
        console = make_console()
        stopping = Stopping(console.print)
        status = stopping.run(run(config, console, stopping))
    raise typer.Exit(status)


@app.command()
def generate(
    prompt: str,
    *,
    address: Annotated[str, typer.Option(help="host:port of the gRPC API.")] = "127.0.0.1:8001",
    model: Annotated[
        str, typer.Option(help="Name of the model; by default the only one that is served.")
    ] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 (greedy) to 2.")] = 0.6,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Authority of the server's certificate; with it by TLS.")
    ] = None,
    cert: Annotated[Path | None, typer.Option(help="Certificate to show, if it asks.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
) -> None:
    """Stream the text that follows PROMPT from a running server, by gRPC.

    An API key is taken from the environment: BATON_API_KEY.
    """
    from baton.cli.client_tls import client_tls
    from baton.cli.generate import generate as run
    from baton.client import Options

    with errors_shown():
        options = Options(model=model, max_tokens=max_tokens, temperature=temperature, seed=seed)
        run(address, prompt, options, client_tls(ca, cert, key))


@app.command()
def explain(
    request_id: str,
    *,
    url: Annotated[str, typer.Option(help="Of the gateway's HTTP API.")] = "http://127.0.0.1:8000",
) -> None:
    """Say why a request went where it did: candidates, predictions, and what came of it.

    An API key is taken from the environment: BATON_API_KEY.
    """
    from baton.cli.explain import explain as run

    with errors_shown():
        run(url, request_id, make_console())


@app.command()
def top(
    *,
    url: Annotated[str, typer.Option(help="Of the gateway's HTTP API.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
) -> None:
    """Watch a running gateway: pools, KV, queues, tokens per second, and latency.

    An API key is taken from the environment: BATON_API_KEY.
    """
    from baton.cli.top import top as run

    with errors_shown():
        run(url, make_console(), once=once)


@app.command()
def demo() -> None:
    """Watch five requests go from a prefill process to a decode process; takes about 20 seconds."""
    from baton.cli.demo.run import demo as run
    from baton.cli.stopping import Stopping
    from baton.core import log

    with errors_shown():
        log.choose(form="auto", level="warning")  # the screen tells the rest
        log.configure()
        console = make_console()
        stopping = Stopping(console.print)
        status = stopping.run(run(console, stopping))
    raise typer.Exit(status)


@app.command()
def doctor() -> None:
    """Say what is here (Python, torch, GPUs, UCX, Ray, memory), what will be used, and why."""
    from baton.cli.doctor import report

    raise typer.Exit(0 if report(make_console()) else 1)


@app.command()
def version() -> None:
    """Print the version."""
    from baton import __version__

    print(f"baton {__version__}")


chat_command.register(app)
cluster_commands.register(app)
identity_commands.register(app)


def main() -> None:
    """Run the command; what is not installed is told by the extra that brings it."""
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "baton":
            raise
        lacks = f"Error: {error.name} is not installed: pip install 'baton-serve[server]'"
        make_console(stderr=True).print(lacks, style="red", markup=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
