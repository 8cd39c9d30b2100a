//! What the agent of a node shows to Prometheus.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::cluster::Node;

/// A page of metrics: each line's name and labels, and its value.
pub fn scrape(node: &Node) -> Result<BTreeMap<String, f64>> {
    let text = node.netns.run(|_| -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", ferroflow::observe::PORT))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })??;
    ensure!(text.starts_with("HTTP/1.1 200") && text.ends_with("# EOF\n"), "{text}");
    let (_, page) = text.split_once("\r\n\r\n").context("no body")?;
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').with_context(|| format!("`{line}` is no metric"))?;
            Ok((name.to_owned(), value.parse()?))
        })
        .collect()
}
