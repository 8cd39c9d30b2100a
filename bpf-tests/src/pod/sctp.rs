//! SCTP sockets of the one-to-one style (RFC 6458 section 4): an association is used as a connection of TCP is.

use std::{io, net::SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpSocket};

const BACKLOG: i32 = 128;

/// For an address of this family; not blocking.
fn open(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::SCTP))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// `None` where the kernel has no SCTP.
pub(super) fn listen(addr: SocketAddr) -> io::Result<Option<TcpListener>> {
    let socket = match open(addr) {
        Err(error) if is_missing(&error) => return Ok(None),
        other => other?,
    };
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into()).map(Some)
}

/// Yet to be connected.
pub(super) fn client(target: SocketAddr) -> io::Result<TcpSocket> {
    Ok(TcpSocket::from_std_stream(open(target)?.into()))
}

/// Whether this machine's kernel has SCTP (`CONFIG_IP_SCTP`), built in or loaded.
pub fn is_there() -> io::Result<bool> {
    match open(SocketAddr::from(([0, 0, 0, 0], 0))) {
        Ok(_socket) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::errno::Errno::EPROTONOSUPPORT as i32)
}
