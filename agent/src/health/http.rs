//! Answering over HTTP/1 on one port: what is answered is for others to say.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::Answer;

/// How long a port that is taken waits for its next try.
const RETRY: Duration = Duration::from_secs(5);

/// Who asks does so in one packet; whoever takes longer goes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// How long a listener waits for somebody before it looks whether it is to end.
const TURN: Duration = Duration::from_millis(100);

pub(crate) const BACKLOG: u32 = 1024;

/// Connections at once, on each port.
const CONNECTIONS: usize = 128;

/// Tries until the port is free; `failed` is told of every try.
pub(crate) async fn bind(
    open: impl Fn() -> io::Result<TcpListener>,
    mut failed: impl FnMut(&io::Error),
) -> TcpListener {
    loop {
        match open() {
            Ok(listener) => return listener,
            Err(error) => failed(&error),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Gives each path the answer of `respond`, which is also told who asks. Ends when it `is_finished` and everybody who
/// has come was answered.
pub(crate) async fn listen<F>(
    listener: TcpListener,
    is_finished: impl Fn() -> bool,
    respond: impl Fn(IpAddr, String) -> F + Clone + Send + Sync + 'static,
) where
    F: Future<Output = Answer> + Send,
{
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let finished = is_finished();
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let accepted = match tokio::time::timeout(TURN, listener.accept()).await {
            Ok(accepted) => accepted,
            Err(_) if finished => break,
            Err(_) => continue,
        };
        match accepted {
            Ok((stream, peer)) => {
                let respond = respond.clone();
                tokio::spawn(async move {
                    serve(stream, peer, &respond).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::debug!("a port that is answered on: {error}");
                tokio::time::sleep(PATIENCE).await;
            }
        }
    }
    drop(listener);
    // All permits are back once everybody has been answered.
    let _all = permits.acquire_many(CONNECTIONS as u32).await;
}

async fn serve<F>(stream: TcpStream, peer: SocketAddr, respond: &impl Fn(IpAddr, String) -> F)
where
    F: Future<Output = Answer>,
{
    let respond = |request: Request<Incoming>| {
        let answer = respond(peer.ip(), request.uri().path().to_owned());
        async { Ok::<_, Infallible>(response(answer.await)) }
    };
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service_fn(respond));
    match tokio::time::timeout(PATIENCE, connection).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => tracing::debug!("asked by {peer}: {error}"),
    }
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let mut builder = Response::builder().status(answer.status);
    for (name, value) in answer.headers {
        builder = builder.header(name, value);
    }
    // Our own names and numbers always make a response.
    builder.body(Full::from(answer.body)).unwrap_or_default()
}
