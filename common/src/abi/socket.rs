//! What the socket programs remember of a socket.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{Addr, Port};

/// The translation of a socket's destination, kept in the socket itself: it lives exactly as long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Translation {
    /// What the application asked for and is shown by getpeername and recvmsg.
    pub frontend: Addr,
    pub backend: Addr,
    pub frontend_port: Port,
    pub backend_port: Port,
    /// The backend's row and its generation at the choice.
    pub index: u32,
    pub generation: u32,
}
