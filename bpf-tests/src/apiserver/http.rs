//! Requests to answers.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::{Method, Request, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::fault::{Fault, Verb};
use super::store::{Page, Selector, event};
use super::{Recorded, Shared};

pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What a request asks for.
struct Query {
    limit: usize,
    /// `version:key`, as this server writes it.
    r#continue: String,
    verb: Verb,
    bookmarks: bool,
    version: u64,
    timeout: Duration,
    fields: Selector,
}

pub(super) async fn answer(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let query = Query::parse(request.method(), request.uri().query().unwrap_or_default());
    let verb = query.verb;
    let authorized = shared.authorized(&request);
    let method = request.method().clone();
    let query_text = request.uri().query().unwrap_or_default().to_owned();
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    shared.record(Recorded {
        verb,
        method: method.to_string(),
        path: path.clone(),
        query: query_text,
        body: body.clone(),
    });
    if !authorized {
        return Ok(status(401, "Unauthorized", None));
    }
    let fault = shared.fault(verb, &path);
    match fault {
        Some(Fault::Status(code, retry)) => return Ok(status(code, "injected", retry)),
        Some(Fault::Hang) => return std::future::pending().await,
        Some(Fault::HangInBody) => return Ok(stream(pending_body())),
        Some(Fault::ExpiredEvent | Fault::Cut(_) | Fault::Slow(_) | Fault::Garbage(_)) | None => {}
    }
    if let Some(object) = shared.store().one(&path).filter(|_| method == Method::GET) {
        return Ok(one(200, object.to_string()));
    }
    Ok(match verb {
        Verb::List => spoiled(list(&shared, &path, &query), fault),
        Verb::Watch => watch(shared, path, query, fault),
        Verb::Write => one(201, body.to_string()),
    })
}

fn list(shared: &Shared, path: &str, query: &Query) -> String {
    let store = shared.store();
    let (version, after) = match query.r#continue.split_once(':') {
        Some((version, after)) => (version.to_owned(), after),
        None => (store.version().to_string(), ""),
    };
    let Page { items, last } = store.page(path, &query.fields, (query.limit, after));
    let next = last.map(|last| format!("{version}:{last}")).unwrap_or_default();
    let kind = path.rsplit('/').next().unwrap_or_default();
    // The order of the fields is the servers', which matters to who reads them as they come.
    let items: Vec<String> = items.iter().map(Value::to_string).collect();
    let metadata = json!({ "resourceVersion": version, "continue": next });
    format!(
        r#"{{"kind":"{kind}List","apiVersion":"v1","metadata":{metadata},"items":[{}]}}"#,
        items.join(",")
    )
}

fn watch(shared: Arc<Shared>, path: String, query: Query, fault: Option<Fault>) -> Response<Body> {
    let (sender, pieces) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut out = Out { pieces: sender, fault, sent: 0 };
        // Whoever has gone, or was cut off, is told nothing more.
        let _gone = follow(&shared, &path, &query, &mut out).await;
    });
    stream(pieces)
}

/// The connection is of no more use.
struct Gone;

/// The body of a watch, with its fault.
struct Out {
    pieces: mpsc::Sender<io::Result<Bytes>>,
    fault: Option<Fault>,
    sent: usize,
}

async fn follow(shared: &Shared, path: &str, query: &Query, out: &mut Out) -> Result<(), Gone> {
    if out.fault == Some(Fault::ExpiredEvent) {
        return out.line(&expired()).await;
    }
    let mut changed = shared.changed();
    let end = Instant::now() + query.timeout;
    let mut version = query.version;
    loop {
        let (events, now) = {
            let store = shared.store();
            (store.since(version, path, &query.fields), store.version())
        };
        let Some(events) = events else { return out.line(&expired()).await };
        for event in events {
            out.line(&event).await?;
        }
        let news = now > version;
        version = version.max(now);
        if news && query.bookmarks && shared.bookmarks() {
            let kind = path.rsplit('/').next().unwrap_or_default();
            let metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
            out.line(&event("BOOKMARK", json!({ "kind": kind, "metadata": metadata }))).await?;
        }
        let left = end.saturating_duration_since(Instant::now());
        tokio::select! {
            () = out.pieces.closed() => return Err(Gone),
            waited = timeout(left, changed.changed()) => if !matches!(waited, Ok(Ok(()))) {
                return Ok(());
            }
        }
    }
}

fn expired() -> Value {
    let message = "too old resource version";
    event("ERROR", json!({ "kind": "Status", "code": 410, "reason": "Expired", "message": message }))
}

impl Out {
    async fn line(&mut self, line: &Value) -> Result<(), Gone> {
        let text = format!("{line}\n").into_bytes();
        let (pieces, end) = spoil(text, self.fault.as_ref(), &mut self.sent);
        for (pause, piece) in pieces {
            sleep(pause).await;
            self.pieces.send(piece).await.map_err(|_closed| Gone)?;
        }
        if end { Err(Gone) } else { Ok(()) }
    }
}

type Piece = (Duration, io::Result<Bytes>);

/// Bytes of a body with their fault, and whether the body ends there. `sent` counts what went before.
fn spoil(mut text: Vec<u8>, fault: Option<&Fault>, sent: &mut usize) -> (Vec<Piece>, bool) {
    let before = *sent;
    *sent += text.len();
    let whole = |text: Vec<u8>| (Duration::ZERO, Ok(Bytes::from(text)));
    match fault {
        Some(Fault::Cut(after)) if before + text.len() > *after => {
            text.truncate(after.saturating_sub(before));
            // A body that fails ends the connection; a pause lets what came before it out.
            let cut = (Duration::from_millis(20), Err(io::Error::other("cut")));
            (vec![whole(text), cut], true)
        }
        Some(Fault::Garbage(after)) if before + text.len() > *after => {
            text.truncate(after.saturating_sub(before));
            text.extend_from_slice(b"\x00<html>\xff]}\n{\"type\":\n");
            (vec![whole(text)], true)
        }
        Some(Fault::Slow(pause)) => {
            (text.chunks(512).map(|piece| (*pause, Ok(Bytes::copy_from_slice(piece)))).collect(), false)
        }
        _ => (vec![whole(text)], false),
    }
}

/// A body that is known as a whole, with its fault.
fn spoiled(text: String, fault: Option<Fault>) -> Response<Body> {
    let (sender, pieces) = mpsc::channel(16);
    let (list, _end) = spoil(text.into_bytes(), fault.as_ref(), &mut 0);
    tokio::spawn(async move {
        for (pause, piece) in list {
            sleep(pause).await;
            if sender.send(piece).await.is_err() {
                return;
            }
        }
    });
    stream(pieces)
}

fn pending_body() -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, pieces) = mpsc::channel(1);
    tokio::spawn(async move { sender.closed().await });
    pieces
}

fn stream(pieces: mpsc::Receiver<io::Result<Bytes>>) -> Response<Body> {
    let frames = futures_util::stream::unfold(pieces, async |mut pieces| {
        Some((pieces.recv().await?.map(Frame::data), pieces))
    });
    let body = UnsyncBoxBody::new(StreamBody::new(frames));
    Response::builder().header("content-type", "application/json").body(body).unwrap_or_default()
}

fn one(code: u16, text: String) -> Response<Body> {
    let body = http_body_util::Full::new(Bytes::from(text)).map_err(|never| match never {});
    let response = Response::builder().status(code).header("content-type", "application/json");
    response.body(UnsyncBoxBody::new(body)).unwrap_or_default()
}

fn status(code: u16, message: &str, retry_after: Option<u32>) -> Response<Body> {
    let text = json!({ "kind": "Status", "status": "Failure", "code": code, "message": message });
    let mut response = one(code, text.to_string());
    if let Some(seconds) = retry_after {
        response.headers_mut().insert("retry-after", seconds.into());
    }
    response
}

impl Query {
    fn parse(method: &Method, text: &str) -> Self {
        let pairs: Vec<(String, String)> = text
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), decode(value)))
            .collect();
        let get = |key: &str| pairs.iter().find(|(it, _)| it == key).map_or("", |(_, value)| value.as_str());
        Self {
            limit: get("limit").parse().unwrap_or(usize::MAX),
            r#continue: get("continue").to_owned(),
            verb: match (method == Method::GET, get("watch")) {
                (true, "true" | "1") => Verb::Watch,
                (true, _) => Verb::List,
                (false, _) => Verb::Write,
            },
            bookmarks: matches!(get("allowWatchBookmarks"), "true" | "1"),
            version: get("resourceVersion").parse().unwrap_or_default(),
            timeout: Duration::from_secs(get("timeoutSeconds").parse().unwrap_or(1800)),
            fields: Selector::parse(get("fieldSelector")),
        }
    }
}

/// Percent signs and plus signs, as forms have them.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let hex: String = rest.by_ref().take(2).map(char::from).collect();
                u8::from_str_radix(&hex, 16).unwrap_or(b'?')
            }
            other => other,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
