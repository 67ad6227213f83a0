//! Connections, routes and the end of the server.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::sse::{Event as SseEvent, Sse};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use futures_util::stream;
use moe_core::Model;
use moe_core::data::Tokenizer;
use moe_core::generate::Sequences;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{Sender, UnboundedReceiver, channel, unbounded_channel};

use super::Arguments;
use super::replies::{Gathered, Reply, Streamed};
use super::requests::{self, Job, Refused, Served};
use super::worker::{Event, Request, work};
use crate::progress::Progress;
use crate::{Error, Result};

/// Bytes of a request, at most.
const LARGEST_REQUEST: usize = 64 << 20;

/// What every handler has.
struct Front {
    served: Served,
    model: Arc<Model>,
    requests: Sender<Request>,
    replies: AtomicU64,
}

/// Serves until a signal ends it.
pub fn run(arguments: &Arguments, progress: Progress) -> Result<()> {
    let tokenizer = Tokenizer::from_dir(&arguments.model.model)?;
    let model = Arc::new(arguments.model.open()?);
    // A model that cannot generate is refused before anybody is answered.
    Sequences::new(&model)?;
    let directory = arguments.model.model.canonicalize().map_err(Error::io(&arguments.model.model))?;
    let named = directory.file_name().map(|name| name.to_string_lossy().into_owned());
    let served = |tokenizer: Tokenizer| Served {
        name: arguments.name.clone().or(named.clone()).unwrap_or_else(|| "model".into()),
        stop: tokenizer.eos_ids().iter().chain(&model.config().eos_token_ids).copied().collect(),
        tokenizer,
        positions: model.config().max_position_embeddings,
        max_new_tokens: arguments.max_new_tokens,
    };
    if !arguments.listen.ip().is_loopback() {
        tracing::warn!("{}: other machines may reach it, and there is no authentication", arguments.listen);
    }
    let (sender, mut receiver) = channel(arguments.queue);
    let own = served(Tokenizer::from_dir(&arguments.model.model)?);
    let front = Front { served: served(tokenizer), model: model.clone(), requests: sender, replies: AtomicU64::new(0) };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::io("threads of the server"))?;
    let batch = arguments.batch;
    let worker = std::thread::spawn(move || work(&model, &own, batch, &mut receiver));
    let listened = runtime.block_on(listen(arguments, front, progress));
    // Handlers that are still there go now, and with them the last that could ask the worker for anything.
    drop(runtime);
    match worker.join() {
        Ok(worked) => worked?,
        Err(_) => return Err(Error::Invalid("the thread that runs the model has panicked".into())),
    }
    listened
}

async fn listen(arguments: &Arguments, front: Front, progress: Progress) -> Result<()> {
    let at = arguments.listen.to_string();
    let listener = TcpListener::bind(arguments.listen).await.map_err(Error::io(&at))?;
    let address = listener.local_addr().map_err(Error::io(&at))?;
    let name = front.served.name.clone();
    let routes = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .route("/health", get(|| async { Json(json!({ "status": "ok" })) }))
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(LARGEST_REQUEST))
        .with_state(Arc::new(front));
    println!("{name} at http://{address}");
    let signals = Arc::new(tokio::sync::Semaphore::new(0));
    let heard = signals.clone();
    tokio::spawn(async move {
        loop {
            signal().await;
            heard.add_permits(1);
        }
    });
    let first = signals.clone();
    let ending = async move {
        first.acquire().await.map(tokio::sync::SemaphorePermit::forget).unwrap_or_default();
        progress.say("no new requests; those under way are answered");
    };
    // The end of those under way: a second signal, or the time that they have.
    let (begun, ended) = tokio::sync::oneshot::channel();
    let grace = Duration::from_secs(arguments.grace);
    let cut = async move {
        if ended.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::select! {
            () = tokio::time::sleep(grace) => {}
            _ = signals.acquire() => {}
        }
    };
    let serve = axum::serve(listener, routes).with_graceful_shutdown(async move {
        ending.await;
        let _ = begun.send(());
    });
    tokio::select! {
        served = async { serve.await } => served.map_err(Error::io(&at)),
        () = cut => {
            progress.say("requests under way were cut off");
            Ok(())
        }
    }
}

/// Waits for an interrupt or SIGTERM.
async fn signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

async fn completions(State(front): State<Arc<Front>>, body: Bytes) -> Response {
    answer(front, body, requests::completions).await
}

async fn chat(State(front): State<Arc<Front>>, body: Bytes) -> Response {
    answer(front, body, requests::chat).await
}

async fn models(State(front): State<Arc<Front>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [described(&front.served.name)] }))
}

async fn model(State(front): State<Arc<Front>>, Path(name): Path<String>) -> Response {
    match name == front.served.name {
        true => Json(described(&name)).into_response(),
        false => refused(&Refused {
            status: 404,
            kind: "invalid_request_error",
            message: format!("`model`: found `{name}`, expected `{}`", front.served.name),
        }),
    }
}

fn described(name: &str) -> Value {
    json!({ "id": name, "object": "model", "created": 0, "owned_by": "moe" })
}

async fn unknown(uri: axum::http::Uri) -> Response {
    let message = format!("{}: expected /v1/completions, /v1/chat/completions, /v1/models or /health", uri.path());
    refused(&Refused { status: 404, kind: "invalid_request_error", message })
}

fn refused(refused: &Refused) -> Response {
    let status = StatusCode::from_u16(refused.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(refused.body())).into_response()
}

/// Checks a request, puts it into the queue and replies, whole or in parts. A client that hangs up drops this, and with
/// it the receiver, which the worker sees before its next step.
async fn answer(
    front: Arc<Front>,
    body: Bytes,
    read: fn(&[u8], &Served) -> std::result::Result<Job, Refused>,
) -> Response {
    let checked = tokio::task::spawn_blocking(move || {
        let job = read(&body, &front.served)?;
        for (index, choice) in job.choices.iter().enumerate() {
            Sequences::check(&front.model, &choice.prompt, &choice.options)
                .map_err(|error| Refused::wrong(format!("completion {index}: {error}")))?;
        }
        Ok((front, job))
    });
    let (front, job) = match checked.await {
        Ok(Ok(checked)) => checked,
        Ok(Err(why)) => return refused(&why),
        Err(error) => {
            return refused(&Refused { status: 500, kind: "server_error", message: error.to_string() });
        }
    };
    let reply = Reply::new(&job, &front.served.name, front.replies.fetch_add(1, Ordering::Relaxed));
    let (choices, streamed, include_usage) = (job.choices.len(), job.stream, job.include_usage);
    let (events, receiver) = unbounded_channel();
    match front.requests.try_send(Request { job, events }) {
        Ok(()) => {}
        Err(TrySendError::Full(_)) => {
            let message = "as many requests wait as the server's queue holds: try again".to_string();
            let full = Refused { status: 429, kind: "rate_limit_error", message };
            return ([(RETRY_AFTER, "1")], refused(&full)).into_response();
        }
        Err(TrySendError::Closed(_)) => {
            let message = "the server is at its end".to_string();
            return refused(&Refused { status: 503, kind: "server_error", message });
        }
    }
    match streamed {
        true => parts(receiver, Streamed::new(reply, choices, include_usage)).await,
        false => whole(receiver, Gathered::new(reply, choices)).await,
    }
}

async fn whole(mut events: UnboundedReceiver<(usize, Event)>, mut gathered: Gathered) -> Response {
    while let Some((index, event)) = events.recv().await {
        match gathered.take(index, event) {
            Ok(true) => return Json(gathered.body()).into_response(),
            Ok(false) => {}
            Err(why) => return refused(&why),
        }
    }
    cut_off()
}

async fn parts(mut events: UnboundedReceiver<(usize, Event)>, streamed: Streamed) -> Response {
    // What cannot be begun has a status of its own, since nothing was sent.
    let first = match events.recv().await {
        None => return cut_off(),
        Some((_, Event::Failed(why))) => return refused(&why),
        Some(first) => first,
    };
    let sending = Sending { first: Some(first), events, streamed, ready: VecDeque::new(), last: false };
    Sse::new(stream::unfold(sending, next_part)).into_response()
}

/// A reply on its way, part by part.
struct Sending {
    first: Option<(usize, Event)>,
    events: UnboundedReceiver<(usize, Event)>,
    streamed: Streamed,
    ready: VecDeque<String>,
    last: bool,
}

async fn next_part(mut sending: Sending) -> Option<(std::result::Result<SseEvent, Infallible>, Sending)> {
    loop {
        if let Some(data) = sending.ready.pop_front() {
            return Some((Ok(SseEvent::default().data(data)), sending));
        }
        if sending.last {
            return None;
        }
        // A reply that is cut off has no end that says it is complete.
        let (index, event) = match sending.first.take() {
            Some(first) => first,
            None => sending.events.recv().await?,
        };
        let failed = matches!(event, Event::Failed(_));
        let (parts, last) = sending.streamed.take(index, event);
        sending.ready.extend(parts.iter().map(Value::to_string));
        sending.last = last;
        if last && !failed {
            sending.ready.push_back("[DONE]".into());
        }
    }
}

fn cut_off() -> Response {
    let message = "the server ended before the completion did".to_string();
    refused(&Refused { status: 503, kind: "server_error", message })
}
