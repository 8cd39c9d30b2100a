//! DNS, as much as a test needs: one question, one TXT record with who answered and whom it saw.

use std::{
    cell::RefCell,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::atomic::{AtomicU16, AtomicUsize, Ordering},
};

use tokio::net::UdpSocket;

use super::{Answer, Failure, Requests};

const HEADER: usize = 12;
/// `who.test.`, type TXT, class IN.
const QUESTION: &[u8] = b"\x03who\x04test\0\0\x10\0\x01";
const RECURSION_DESIRED: u16 = 0x0100;
const RESPONSE: u16 = 0x8000;

/// On a connected socket: an ICMP error comes back as an errno.
pub(super) async fn ask_connected(requests: Requests) -> Result<Answer, Failure> {
    ask_peer(&connect(&requests).await?).await
}

async fn connect(requests: &Requests) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(requests.source()).await?;
    socket.connect(requests.target).await?;
    Ok(socket)
}

async fn ask_peer(socket: &UdpSocket) -> Result<Answer, Failure> {
    let id = next_id();
    socket.send(&question(id)).await?;
    let mut packet = [0; 512];
    loop {
        let len = socket.recv(&mut packet).await?;
        let server = socket.peer_addr()?;
        if let Some((by, client)) = parse_answer(packet.get(..len).unwrap_or_default(), id) {
            return Ok(Answer { by, client, server });
        }
    }
}

pub(super) async fn ask_unconnected(requests: Requests) -> Result<Answer, Failure> {
    ask_from(&UdpSocket::bind(requests.source()).await?, requests).await
}

/// One socket for all questions.
pub(super) struct Resolver {
    socket: UdpSocket,
    targets: Vec<SocketAddr>,
    asked: AtomicUsize,
}

impl Resolver {
    pub(super) async fn new(requests: &Requests, also: &[SocketAddr]) -> io::Result<Self> {
        let socket = UdpSocket::bind(requests.source()).await?;
        let targets = [&[requests.target], also].concat();
        Ok(Self { socket, targets, asked: AtomicUsize::new(0) })
    }

    /// Asks the target whose turn it is.
    pub(super) async fn ask(&self, requests: Requests) -> Result<Answer, Failure> {
        let turn = self.asked.fetch_add(1, Ordering::Relaxed) % self.targets.len();
        let target = self.targets.get(turn).copied().unwrap_or(requests.target);
        ask_from(&self.socket, Requests { target, ..requests }).await
    }
}

/// One connected socket for all questions, and another one after an error. One that gets no answer is kept.
#[derive(Default)]
pub(super) struct ConnectedResolver {
    socket: RefCell<Option<Rc<UdpSocket>>>,
}

impl ConnectedResolver {
    pub(super) async fn ask(&self, requests: Requests) -> Result<Answer, Failure> {
        let kept = self.socket.borrow().clone();
        let socket = match kept {
            Some(socket) => socket,
            None => {
                let socket = Rc::new(connect(&requests).await?);
                self.socket.replace(Some(socket.clone()));
                socket
            }
        };
        let answer = ask_peer(&socket).await;
        if answer.is_err() {
            self.socket.replace(None);
        }
        answer
    }
}

async fn ask_from(socket: &UdpSocket, requests: Requests) -> Result<Answer, Failure> {
    let id = next_id();
    socket.send_to(&question(id), requests.target).await?;
    let mut packet = [0; 512];
    loop {
        let (len, server) = socket.recv_from(&mut packet).await?;
        let Some((by, client)) = parse_answer(packet.get(..len).unwrap_or_default(), id) else { continue };
        if server != requests.target {
            return Err(Failure::wrong(format!("asked {}, answered by {server}", requests.target)));
        }
        return Ok(Answer { by, client, server });
    }
}

/// The answer to a packet that holds one question, else nothing.
pub(super) fn answer(packet: &[u8], name: &str, client: SocketAddr) -> Option<Vec<u8>> {
    let (header, rest) = packet.split_at_checked(HEADER)?;
    if word(header, 2)? & RESPONSE != 0 || word(header, 4)? != 1 {
        return None;
    }
    let question = rest.get(..question_len(rest)?)?;
    let strings = [name.as_bytes(), client.to_string().as_bytes()].map(character_string).concat();

    let mut reply = reply_header(word(header, 0)?);
    reply.extend(question);
    // A pointer to the name in the question, TXT, IN, no caching.
    reply.extend([0xc0, HEADER as u8, 0, 16, 0, 1, 0, 0, 0, 0]);
    reply.extend(u16::try_from(strings.len()).ok()?.to_be_bytes());
    reply.extend(strings);
    Some(reply)
}

fn question(id: u16) -> Vec<u8> {
    [&id.to_be_bytes()[..], &RECURSION_DESIRED.to_be_bytes(), &[0, 1, 0, 0, 0, 0, 0, 0], QUESTION].concat()
}

fn reply_header(id: u16) -> Vec<u8> {
    let flags = RESPONSE | RECURSION_DESIRED;
    [&id.to_be_bytes()[..], &flags.to_be_bytes(), &[0, 1, 0, 1, 0, 0, 0, 0]].concat()
}

/// Who answered and whom it saw, if this is the answer to question `id`.
fn parse_answer(packet: &[u8], id: u16) -> Option<(String, SocketAddr)> {
    let (header, rest) = packet.split_at_checked(HEADER)?;
    if word(header, 0)? != id || word(header, 2)? & RESPONSE == 0 || word(header, 6)? != 1 {
        return None;
    }
    let record = rest.get(question_len(rest)?..)?;
    // Name, type, class, lifetime and length take 12 bytes.
    let (name, strings) = split_string(record.get(12..)?)?;
    let (client, _) = split_string(strings)?;
    Some((name.to_owned(), client.parse().ok()?))
}

/// Length of the question that `bytes` begin with: labels, a zero, type and class.
fn question_len(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match *bytes.get(at)? {
            0 => return Some(at + 5),
            len if len < 64 => at += 1 + usize::from(len),
            _ => return None,
        }
    }
}

fn character_string(bytes: &[u8]) -> Vec<u8> {
    let len = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    [&[len][..], &bytes[..usize::from(len)]].concat()
}

fn split_string(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = bytes.split_first()?;
    let (string, rest) = rest.split_at_checked(usize::from(*len))?;
    Some((std::str::from_utf8(string).ok()?, rest))
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

fn next_id() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_says_who_and_whom() {
        let client: SocketAddr = "[fd00:10:244:1::2]:40000".parse().unwrap();
        let reply = answer(&question(7), "a1", client).unwrap();
        assert_eq!(parse_answer(&reply, 7), Some(("a1".into(), client)));
        assert_eq!(parse_answer(&reply, 8), None);
    }

    #[test]
    fn what_is_no_question_gets_no_answer() {
        let client = "10.0.0.1:1".parse().unwrap();
        let reply = answer(&question(7), "a1", client).unwrap();
        assert_eq!(answer(&reply, "a1", client), None);
        for len in 0..question(7).len() {
            assert_eq!(answer(&question(7)[..len], "a1", client), None);
        }
    }
}
