//! The HTTP client of a pod.

use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::net::SocketAddr;
use tokio::net::{TcpSocket, TcpStream};

use super::{Answer, Failure, FailureKind, Requests, sctp};

#[derive(Deserialize)]
struct Body {
    by: String,
    client: SocketAddr,
}

pub(super) async fn request(requests: Requests) -> Result<Answer, Failure> {
    let socket = match requests.target {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    exchange(socket, &requests).await
}

/// One association carries the request and its answer.
pub(super) async fn request_over_sctp(requests: Requests) -> Result<Answer, Failure> {
    exchange(sctp::client(requests.target)?, &requests).await
}

async fn exchange(socket: TcpSocket, requests: &Requests) -> Result<Answer, Failure> {
    let stream = connect(socket, requests).await?;
    let server = stream.peer_addr()?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    tokio::spawn(connection);
    let request = Request::get("/")
        .header(header::HOST, requests.target.to_string())
        .body(Empty::<Bytes>::new())
        .map_err(|error| Failure::caused_by(&error))?;
    let response = sender.send_request(request).await.map_err(failed)?;
    let body = response.into_body().collect().await.map_err(failed)?.to_bytes();
    let Body { by, client } = serde_json::from_slice(&body)
        .map_err(|error| Failure::wrong(format!("not the answer of a pod: {error}")))?;
    Ok(Answer { by, client, server })
}

async fn connect(socket: TcpSocket, requests: &Requests) -> Result<TcpStream, Failure> {
    if requests.names_source() {
        // The port may be in TIME_WAIT from the request before.
        socket.set_reuseaddr(true)?;
        socket.bind(requests.source())?;
    }
    Ok(socket.connect(requests.target).await?)
}

fn failed(error: hyper::Error) -> Failure {
    if error.is_incomplete_message() {
        return Failure { kind: FailureKind::Reset, detail: "closed before the answer was complete".into() };
    }
    Failure::caused_by(&error)
}
