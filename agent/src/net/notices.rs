//! What the kernel tells of its own accord.

use std::io;

use futures_util::Stream;
use rtnetlink::{MulticastGroup, new_multicast_connection};

/// Something for each change that these groups are told of, and for those that were lost on the way.
///
/// By a socket of their own, which asks nothing: the kernel gives a notice the number of the request that it comes from,
/// whoever made that one, so that at a socket which asks, somebody else's change is taken for the answer: a list would
/// end with it, and lack what is there.
///
/// # Errors
/// Where there is no socket to be had.
pub(super) fn notices(groups: &[MulticastGroup]) -> io::Result<impl Stream<Item: Send> + Unpin + Send> {
    let (connection, _asks_nothing, notices) = new_multicast_connection(groups)?;
    tokio::spawn(connection);
    Ok(notices)
}
