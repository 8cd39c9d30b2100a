//! What the socket programs remember of a socket.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{Addr, Port};

/// The translation of a socket's destination, kept in the socket itself: it lives exactly as long. All zeros where
/// there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Translation {
    /// What the application asked for and is shown by getpeername and recvmsg.
    pub frontend: Addr,
    pub backend: Addr,
    pub frontend_port: Port,
    pub backend_port: Port,
    /// The backend's row, which is never 0, and its generation at the choice.
    pub index: u32,
    pub generation: u32,
}

/// What a datagram socket remembers: it may send to several services, and an answer has to come from the one that was
/// asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Translations {
    /// The row that was used last.
    pub last: u32,
    pub rows: [Translation; Self::ROWS],
}

impl Translations {
    /// So many services at once; one more takes the place of another. A power of two.
    pub const ROWS: usize = 4;
}
