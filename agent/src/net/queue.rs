//! Queues that hold packets back until their turn: a limit of a pod's bandwidth is a token bucket (`sch_tbf`) at the
//! interface that its packets leave by, the host's end of the veth for what it gets and its own for what it sends.
//!
//! A pod's processes with NET_ADMIN can take their own end's away; that is as far as a limit of what a pod sends goes.

use std::collections::BTreeSet;

use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use serde::{Deserialize, Serialize};
use zerocopy::{Immutable, IntoBytes};

use super::netns::Session;
use super::pod::PodError;

/// What a pod may get and send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// To the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Limit>,
    /// From the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Limit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Bytes a second, at least one.
    pub rate: u64,
    /// How many bytes may go at once after a rest; 0 for as many as is usual. Runtimes ask for the most that their field
    /// holds, half a gigabyte, which would be no limit for anything short: the usual is the most.
    pub burst: u64,
}

impl Limits {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Limit {
    /// Bytes that may go at once at an interface with this MTU: a tenth of a second's, and at least a packet's.
    fn bucket(self, mtu: u32) -> u32 {
        let least = u64::from(mtu) + HEADERS;
        let usual = (self.rate / 10).max(USUAL);
        let asked = if self.burst == 0 { usual } else { self.burst.min(usual) };
        u32::try_from(asked.max(least)).unwrap_or(u32::MAX)
    }

    /// Bytes that may wait, 50 ms worth: more would be felt as delay and not as a limit.
    fn queue(self, bucket: u32) -> u32 {
        u32::try_from(self.rate / 20).unwrap_or(u32::MAX).max(LEAST_QUEUE).max(bucket)
    }
}

/// Of a packet on an interface, beside what its MTU counts.
const HEADERS: u64 = 18;
/// Slow links have bursts of so many bytes all the same: a handful of packets.
const USUAL: u64 = 16 << 10;
/// One aggregate of TCP segments.
const LEAST_QUEUE: u32 = 64 << 10;

/// Limits what leaves by the interface, whose name and index these are.
pub(super) fn limit(
    session: &Session,
    (name, ifindex): (&str, u32),
    limit: Limit,
    mtu: u32,
) -> Result<(), PodError> {
    let what = || format!("limit what leaves by {name} to {} bytes/s (has this kernel sch_tbf?)", limit.rate);
    session.request(what, add(session.netlink.clone(), token_bucket(ifindex, limit, mtu)))
}

/// rtnetlink builds the queues that it knows, and this is none of them.
async fn add(mut netlink: Handle, queue: TcMessage) -> Result<(), rtnetlink::Error> {
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(queue));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    let mut answers = netlink.request(message)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(rtnetlink::Error::NetlinkError(error));
        }
    }
    Ok(())
}

fn token_bucket(ifindex: u32, limit: Limit, mtu: u32) -> TcMessage {
    let bucket = limit.bucket(mtu);
    let parameters = TokenBucket {
        rate: rate(u32::try_from(limit.rate).unwrap_or(u32::MAX), ETHERNET),
        peak: rate(0, 0),
        limit: limit.queue(bucket),
        buffer: 0,
        mtu: 0,
    };
    let option = |kind, value: &[u8]| TcOption::Other(DefaultNla::new(kind, value.to_vec()));
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = TcHandle::ROOT;
    message.header.handle = TcHandle { major: 1, minor: 0 };
    message.attributes = vec![
        TcAttribute::Kind(TOKEN_BUCKET.into()),
        TcAttribute::Options(vec![
            option(PARAMETERS, parameters.as_bytes()),
            option(RATE_64, &limit.rate.to_ne_bytes()),
            option(BURST, &bucket.to_ne_bytes()),
        ]),
    ];
    message
}

const TOKEN_BUCKET: &str = "tbf";
/// `TCA_TBF_PARMS`, `TCA_TBF_RATE64` and `TCA_TBF_BURST` of `linux/pkt_sched.h`; the last, in bytes, stands for the first's
/// `buffer`, in ticks.
const PARAMETERS: u16 = 1;
const RATE_64: u16 = 4;
const BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`: the kernel counts by itself, without a table of rates.
const ETHERNET: u8 = 1;

/// The interfaces whose packets wait in a queue.
pub(super) async fn list(handle: &Handle) -> Result<BTreeSet<u32>, rtnetlink::Error> {
    let mut queues = Box::pin(handle.qdisc().get().execute());
    let mut found = BTreeSet::new();
    while let Some(queue) = queues.try_next().await? {
        found.extend(queued(&queue));
    }
    Ok(found)
}

/// The interface, where it is its own queue (and no part of one, and no hook for filters), and holds anything.
fn queued(queue: &TcMessage) -> Option<u32> {
    let kind = queue.attributes.iter().find_map(|attribute| {
        if let TcAttribute::Kind(kind) = attribute { Some(kind.as_str()) } else { None }
    });
    let holds = queue.header.parent == TcHandle::ROOT && kind.is_some_and(|kind| kind != "noqueue");
    holds.then_some(queue.header.index.cast_unsigned())
}

/// `struct tc_ratespec` of `linux/pkt_sched.h`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Rate {
    cell_log: u8,
    linklayer: u8,
    overhead: u16,
    cell_align: i16,
    mpu: u16,
    rate: u32,
}

/// `struct tc_tbf_qopt` of `linux/pkt_sched.h`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct TokenBucket {
    rate: Rate,
    peak: Rate,
    limit: u32,
    buffer: u32,
    mtu: u32,
}

const fn rate(bytes: u32, linklayer: u8) -> Rate {
    Rate { cell_log: 0, linklayer, overhead: 0, cell_align: 0, mpu: 0, rate: bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(rate: u64, burst: u64) -> Limit {
        Limit { rate, burst }
    }

    #[test]
    fn a_bucket_holds_a_packet_and_a_tenth_of_a_second_at_the_most() {
        for (limit, bucket) in [
            (limit(1_250_000, u64::from(u32::MAX) / 8), 125_000),
            (limit(1_250_000, 0), 125_000),
            (limit(1_250_000, 20_000), 20_000),
            (limit(1_250_000, 1), 1_518),
            (limit(1_000, 0), 16 << 10),
            (limit(u64::MAX, 0), u32::MAX),
        ] {
            assert_eq!(limit.bucket(1_500), bucket, "{limit:?}");
            assert!(limit.queue(bucket) >= bucket);
        }
    }

    #[test]
    fn the_kernels_structures_have_its_sizes() {
        assert_eq!((size_of::<Rate>(), size_of::<TokenBucket>()), (12, 36));
    }

    #[test]
    fn roots_that_hold_packets_are_queues_and_hooks_are_none() {
        let queue = token_bucket(7, limit(1, 0), 1_500);
        assert_eq!(queued(&queue), Some(7));
        let mut hook = queue.clone();
        hook.header.parent = TcHandle::CLSACT;
        assert_eq!(queued(&hook), None);
        let mut none = queue;
        none.attributes[0] = TcAttribute::Kind("noqueue".into());
        assert_eq!(queued(&none), None);
    }
}
