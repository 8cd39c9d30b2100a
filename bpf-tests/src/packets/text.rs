//! Packets as a line of text, and back.
//!
//! ```text
//! tcp 10.244.1.2:4000 > 10.96.0.10:80 SYN seq 7 data 414243
//! udp [fd00::1]:5000 > [fd00::96]:53 unchecked data 00
//! sctp 10.244.1.2:4000 > 10.96.0.10:38412 init data 01
//! icmp 192.0.2.1 > 10.244.1.2 3/4 rest 000005dc data 45..
//! proto 47 10.0.0.1 > 10.0.0.2 data 00
//! ```
//! What is as usual is left out: `hops 64`, `id 7`, `seq 1000`, `ack 2000` with ACK, `tag 1`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use anyhow::{Context as _, Error, Result, bail, ensure};

use super::wire::{ACK, Body, Extras, FIN, Packet, Ports, RST, SYN, Segment};

const FLAGS: [(u8, &str); 8] = [
    (SYN, "SYN"),
    (FIN, "FIN"),
    (RST, "RST"),
    (8, "PSH"),
    (ACK, "ACK"),
    (32, "URG"),
    (64, "ECE"),
    (128, "CWR"),
];
const CHUNKS: [(u8, &str); 7] = [
    (0, "data"),
    (1, "init"),
    (2, "init-ack"),
    (6, "abort"),
    (7, "shutdown"),
    (8, "shutdown-ack"),
    (14, "shutdown-complete"),
];
const SEQ: u32 = 1000;
const ACKED: u32 = 2000;
const TAG: u32 = 1;
const HOPS: u8 = 64;
const ID: u16 = 7;

/// TCP flags by name, with commas between them; `none` for none.
pub fn flags(text: &str) -> Result<u8> {
    if text == "none" {
        return Ok(0);
    }
    text.split(',').try_fold(0, |flags, name| {
        let flag = FLAGS.iter().find(|(_, it)| *it == name);
        Ok(flags | flag.with_context(|| format!("no such TCP flag: {name}"))?.0)
    })
}

/// The number of an SCTP chunk by its name.
pub fn chunk(text: &str) -> Result<u8> {
    let named = CHUNKS.iter().find(|(_, name)| *name == text).map(|(number, _)| *number);
    named.or_else(|| text.parse().ok()).with_context(|| format!("no such SCTP chunk: {text}"))
}

/// As [`flags`] reads it.
pub fn flag_names(flags: u8) -> String {
    let named = FLAGS.iter().filter(|(flag, _)| flags & flag != 0);
    let names: Vec<_> = named.map(|(_, name)| *name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(",") }
}

/// As [`chunk`] reads it.
pub fn chunk_name(chunk: u8) -> String {
    let named = CHUNKS.iter().find(|(number, _)| *number == chunk);
    named.map_or_else(|| chunk.to_string(), |(_, name)| (*name).to_owned())
}

/// The bytes of a chunk with this number.
pub fn chunk_bytes(kind: u8, payload: &[u8]) -> Vec<u8> {
    let [l0, l1] = (4 + payload.len() as u16).to_be_bytes();
    [&[kind, 0, l0, l1], payload].concat()
}

/// The usual segment with these flags.
pub fn segment(ports: Ports, flags: u8) -> Segment {
    let ack = if flags & ACK != 0 { ACKED } else { 0 };
    Segment { ports, seq: SEQ, ack, flags, options: Vec::new(), payload: Vec::new() }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = self.ports();
        let kind = match &self.body {
            Body::Tcp(_) => "tcp".to_owned(),
            Body::Udp { .. } => "udp".to_owned(),
            Body::Sctp { .. } => "sctp".to_owned(),
            Body::Icmp { .. } => "icmp".to_owned(),
            Body::Other { proto, .. } => format!("proto {proto}"),
        };
        match ports {
            Some(Ports { src, dst }) => {
                let (src, dst) = (SocketAddr::new(self.src, src), SocketAddr::new(self.dst, dst));
                write!(f, "{kind} {src} > {dst}")?;
            }
            None => write!(f, "{kind} {} > {}", self.src, self.dst)?,
        }
        write_body(f, &self.body)?;
        let Self { hops, id, extras: Extras { options, extensions }, .. } = self;
        write_unless(f, "hops", *hops, HOPS)?;
        write_unless(f, "id", *id, ID)?;
        write_bytes(f, "ip-options", options)?;
        for (kind, body) in extensions {
            write!(f, " extension {kind} {}", hex(body))?;
        }
        Ok(())
    }
}

fn write_body(f: &mut fmt::Formatter<'_>, body: &Body) -> fmt::Result {
    match body {
        Body::Tcp(Segment { seq, ack, flags, options, payload, .. }) => {
            write!(f, " {}", flag_names(*flags))?;
            write_unless(f, "seq", *seq, SEQ)?;
            write_unless(f, "ack", *ack, if flags & ACK != 0 { ACKED } else { 0 })?;
            write_bytes(f, "options", options)?;
            write_bytes(f, "data", payload)
        }
        Body::Udp { checksum, payload, .. } => {
            f.write_str(if *checksum { "" } else { " unchecked" })?;
            write_bytes(f, "data", payload)
        }
        Body::Sctp { tag, chunks, .. } => {
            match chunks.split_first_chunk::<4>() {
                Some(([kind, ..], payload)) if chunk_bytes(*kind, payload) == *chunks => {
                    write!(f, " {}", chunk_name(*kind))?;
                    write_bytes(f, "data", payload)?;
                }
                _ => write_bytes(f, "chunks", chunks)?,
            }
            write_unless(f, "tag", *tag, TAG)
        }
        Body::Icmp { kind, code, rest, payload } => {
            write!(f, " {kind}/{code}")?;
            if *rest != [0; 4] {
                write_bytes(f, "rest", rest)?;
            }
            write_bytes(f, "data", payload)
        }
        Body::Other { bytes, .. } => write_bytes(f, "data", bytes),
    }
}

fn write_unless<T: PartialEq + fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    name: &str,
    value: T,
    usual: T,
) -> fmt::Result {
    if value == usual { Ok(()) } else { write!(f, " {name} {value}") }
}

fn write_bytes(f: &mut fmt::Formatter<'_>, name: &str, bytes: &[u8]) -> fmt::Result {
    if bytes.is_empty() { Ok(()) } else { write!(f, " {name} {}", hex(bytes)) }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// # Errors
/// Where it is no pairs of digits.
pub fn unhex(text: &str) -> Result<Vec<u8>> {
    ensure!(text.len().is_multiple_of(2) && text.is_ascii(), "not bytes: {text}");
    let pairs = (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16));
    pairs.collect::<Result<_, _>>().with_context(|| format!("not bytes: {text}"))
}

impl FromStr for Packet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut words = text.split_whitespace();
        read(&mut words).with_context(|| format!("packet `{text}`"))
    }
}

type Words<'a> = std::str::SplitWhitespace<'a>;

fn read(words: &mut Words<'_>) -> Result<Packet> {
    let kind = next(words)?;
    let proto: u8 = if kind == "proto" { next(words)?.parse()? } else { 0 };
    let src = next(words)?;
    ensure!(next(words)? == ">", "`>` is missing between source and destination");
    let dst = next(words)?;
    let (src, dst, ports) = if ["tcp", "udp", "sctp"].contains(&kind) {
        let socket =
            |text: &str| text.parse::<SocketAddr>().with_context(|| format!("not address:port: {text}"));
        let (src, dst) = (socket(src)?, socket(dst)?);
        (src.ip(), dst.ip(), Ports { src: src.port(), dst: dst.port() })
    } else {
        let addr = |text: &str| text.parse::<IpAddr>().with_context(|| format!("not an address: {text}"));
        (addr(src)?, addr(dst)?, Ports { src: 0, dst: 0 })
    };
    let body = match kind {
        "tcp" => Body::Tcp(segment(ports, flags(next(words)?)?)),
        "udp" => Body::Udp { ports, checksum: true, payload: Vec::new() },
        "sctp" => {
            let name = words.clone().next().unwrap_or_default();
            let chunks = if name == "chunks" { Vec::new() } else { chunk_bytes(chunk(next(words)?)?, &[]) };
            Body::Sctp { ports, tag: TAG, chunks }
        }
        "icmp" => {
            let (kind, code) = next(words)?.split_once('/').context("type/code is missing")?;
            Body::Icmp { kind: kind.parse()?, code: code.parse()?, rest: [0; 4], payload: Vec::new() }
        }
        "proto" => Body::Other { proto, bytes: Vec::new() },
        other => bail!("no such kind of packet: {other}"),
    };
    let mut packet = Packet { hops: HOPS, id: ID, ..Packet::new(src, dst, body) };
    while let Some(field) = words.next() {
        set(&mut packet, field, words).with_context(|| format!("field {field}"))?;
    }
    Ok(packet)
}

fn set(packet: &mut Packet, field: &str, words: &mut Words<'_>) -> Result<()> {
    match (field, &mut packet.body) {
        ("hops", _) => packet.hops = next(words)?.parse()?,
        ("id", _) => packet.id = next(words)?.parse()?,
        ("ip-options", _) => packet.extras.options = unhex(next(words)?)?,
        ("extension", _) => {
            let kind = next(words)?.parse()?;
            packet.extras.extensions.push((kind, unhex(next(words)?)?));
        }
        ("seq", Body::Tcp(segment)) => segment.seq = next(words)?.parse()?,
        ("ack", Body::Tcp(segment)) => segment.ack = next(words)?.parse()?,
        ("options", Body::Tcp(segment)) => segment.options = unhex(next(words)?)?,
        ("data", Body::Tcp(segment)) => segment.payload = unhex(next(words)?)?,
        ("unchecked", Body::Udp { checksum, .. }) => *checksum = false,
        ("data", Body::Udp { payload, .. } | Body::Icmp { payload, .. }) => *payload = unhex(next(words)?)?,
        ("data", Body::Sctp { chunks, .. }) => {
            *chunks = chunk_bytes(
                *chunks.first().context("data comes after the chunk's name")?,
                &unhex(next(words)?)?,
            );
        }
        ("chunks", Body::Sctp { chunks, .. }) => *chunks = unhex(next(words)?)?,
        ("tag", Body::Sctp { tag, .. }) => *tag = next(words)?.parse()?,
        ("rest", Body::Icmp { rest, .. }) => {
            *rest = <[u8; 4]>::try_from(unhex(next(words)?)?.as_slice())?;
        }
        ("data", Body::Other { bytes, .. }) => *bytes = unhex(next(words)?)?,
        _ => bail!("a packet of this kind has no such field"),
    }
    Ok(())
}

fn next<'a>(words: &mut Words<'a>) -> Result<&'a str> {
    words.next().context("the line ends early")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_and_written_back() {
        for line in [
            "tcp 10.244.1.2:4000 > 10.96.0.10:80 SYN",
            "tcp 10.244.1.2:4000 > 10.96.0.10:80 PSH,ACK seq 7 ack 9 options 01010101 data 414243 hops 9",
            "tcp 10.244.1.2:4000 > 10.96.0.10:80 none",
            "udp [fd00::1]:5000 > [fd00::96]:53 unchecked data 00 extension 0 00010400000000",
            "udp 10.0.0.1:5000 > 10.0.0.2:53 id 9 ip-options 01010101",
            "sctp 10.244.1.2:4000 > 10.96.0.10:38412 init data 0102 tag 6",
            "sctp 10.244.1.2:4000 > 10.96.0.10:38412 9",
            "sctp 10.244.1.2:4000 > 10.96.0.10:38412 chunks 01ff",
            "icmp 192.0.2.1 > 10.244.1.2 3/4 rest 000005dc data 45",
            "proto 47 10.0.0.1 > 10.0.0.2 data 00",
        ] {
            assert_eq!(line.parse::<Packet>().unwrap().to_string(), line);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, expected) in [
            ("tcp 10.0.0.1 > 10.0.0.2:80 SYN", "not address:port"),
            ("tcp 10.0.0.1:1 > 10.0.0.2:80 FOO", "no such TCP flag: FOO"),
            ("udp 10.0.0.1:1 > 10.0.0.2:80 seq 4", "field seq"),
            ("udp 10.0.0.1:1 > 10.0.0.2:80 data 4", "not bytes"),
            ("arp 10.0.0.1 > 10.0.0.2", "no such kind of packet: arp"),
            ("icmp 10.0.0.1 > 10.0.0.2", "the line ends early"),
        ] {
            let error = format!("{:#}", line.parse::<Packet>().unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
