//! The server of a pod: HTTP (also over SCTP, where the kernel has it), DNS and echo, each on both families.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result};
use http_body_util::Full;
use hyper::{Request, Response, body::Bytes, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream, UdpSocket},
};

use super::{DNS_PORT, ECHO_PORT, HTTP_PORT, Ready, SCTP_PORT, canonical, dns, say, sctp};

pub(super) async fn serve(name: String) -> Result<()> {
    let web = listen(HTTP_PORT).await?;
    let echo = listen(ECHO_PORT).await?;
    let sctp = sctp::listen(([0; 8], SCTP_PORT).into()).context("listen on the SCTP port")?;
    let dns = UdpSocket::bind(("::", DNS_PORT)).await.context("bind the DNS port")?;
    say(&Ready { ready: name.clone() })?;
    let name: Arc<str> = name.into();
    let over_sctp = async {
        match sctp {
            Some(sctp) => serve_http(sctp, name.clone()).await,
            None => Ok(()),
        }
    };
    tokio::try_join!(
        serve_http(web, name.clone()),
        over_sctp,
        serve_echo(echo),
        serve_dns(dns, name.clone())
    )?;
    Ok(())
}

/// On the unspecified IPv6 address, which takes IPv4 as well.
async fn listen(port: u16) -> Result<TcpListener> {
    TcpListener::bind(("::", port)).await.with_context(|| format!("listen on port {port}"))
}

async fn serve_http(listener: TcpListener, name: Arc<str>) -> Result<()> {
    loop {
        let (stream, client) = listener.accept().await?;
        tokio::spawn(answer_http(stream, canonical(client), name.clone()));
    }
}

async fn answer_http(stream: TcpStream, client: SocketAddr, name: Arc<str>) {
    let answer = service_fn(move |_: Request<Incoming>| {
        let body = json!({ "by": &*name, "client": client }).to_string();
        async move { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(body)))) }
    });
    // The client reports what goes wrong.
    let _ended = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
}

async fn serve_echo(listener: TcpListener) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            let (mut read, mut write) = stream.split();
            let _ended = tokio::io::copy(&mut read, &mut write).await;
            let _ended = write.shutdown().await;
        });
    }
}

async fn serve_dns(socket: UdpSocket, name: Arc<str>) -> Result<()> {
    let mut packet = [0; 512];
    loop {
        // An ICMP error for an earlier answer is reported here; the service goes on.
        let Ok((len, client)) = socket.recv_from(&mut packet).await else { continue };
        let question = packet.get(..len).unwrap_or_default();
        if let Some(answer) = dns::answer(question, &name, canonical(client)) {
            let _unreachable = socket.send_to(&answer, client).await;
        }
    }
}
