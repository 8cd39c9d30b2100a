//! What a program decides about a packet, and why it drops one.

use crate::abi::relay::NodeNumber;

/// Where a packet goes next. The object maps it to a TC or XDP action in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// On to the kernel's stack, as it now is.
    Stack,
    /// Into the local pod behind this host-side interface: an
    /// [`Endpoint::link`](crate::abi::endpoint::Endpoint::link).
    Pod { ifindex: u32 },
    /// To the next hop that the kernel's routes name, past the stack: it would not forward a packet that carries the
    /// node's own address as its source.
    Forward,
    /// Back out of the interface it came from: the packet was turned into its own answer (RST, ICMP error).
    Reply,
    /// Nowhere: it waits for another packet, or a copy of it has been sent round again.
    Taken,
    /// As it is, in the tunnel, to the node with this number: direct server return.
    Relay { node: NodeNumber },
}

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// Why a packet was dropped: one list for the programs, the metrics and the CLI. The number is the index in
        /// the `drops` map, so a number is never given to another reason.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum DropReason {
            $($(#[$doc])* $name = $number,)*
        }

        impl DropReason {
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The reason with this number; the first one where there is none.
            #[inline(always)]
            pub const fn from_number(number: u32) -> Self {
                match number {
                    $($number => Self::$name,)*
                    _ => Self::ALL[0],
                }
            }

            /// Whether packets that are counted under it passed all the same: a policy in dry run would drop them.
            pub const fn is_dry_run(self) -> bool {
                matches!(self, Self::DryRunIngress | Self::DryRunEgress)
            }

            /// What the programs log.
            #[expect(unreachable_patterns, reason = "the first two are written otherwise than the rest")]
            pub const fn line(self) -> &'static str {
                match self {
                    Self::DryRunIngress => "passed: policy-ingress-dry-run",
                    Self::DryRunEgress => "passed: policy-egress-dry-run",
                    $(Self::$name => concat!("dropped: ", $text),)*
                }
            }

            /// The reason as metrics and the CLI print it.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

drop_reasons! {
    /// A header runs past the end of the packet, or a length contradicts another.
    Truncated = 0, "truncated";
    /// A later fragment of a datagram to a service whose first fragment was dropped or refused; or an SCTP fragment that
    /// would get other ports.
    Fragment = 1, "fragment-of-service";
    /// The service has endpoints, but none that this traffic may use (rule 15: dropped, never rejected).
    NoLocalEndpoint = 2, "no-local-endpoint";
    /// A frontend's slots named a backend that is not live; the agent is between two writes or the tables are damaged.
    NoBackend = 3, "no-backend";
    /// Every source port that a new flow tried is another flow's towards the same backend.
    TupleCollision = 4, "tuple-collision";
    /// The connection table took no entry (rule 36: counted apart from "full").
    ConntrackInsert = 5, "conntrack-insert-failed";
    /// A helper that rewrites the packet refused.
    Rewrite = 6, "rewrite-failed";
    /// The answer to a rejected packet could not be built.
    Reject = 7, "reject-failed";
    /// An IPv6 extension header chain longer than the programs follow.
    ExtensionHeaders = 8, "extension-headers";
    /// A packet that must not be answered (RST, ICMP error) for a service without endpoints.
    NoEndpoint = 9, "no-endpoint";
    /// The client is in none of the service's `loadBalancerSourceRanges` (rule 22).
    SourceRange = 10, "source-range";
    /// The client must be masqueraded, and the node has no address of its family.
    NoMasquerade = 11, "no-masquerade-address";
    /// The kernel's routes lead nowhere from here.
    NoRoute = 12, "no-route";
    /// A fragment came before the first one of its datagram, and could not be kept until that comes (rule 38).
    EarlyFragment = 13, "fragment-before-first";
    /// The destination is in a range of cluster IPs and no service has it (rule 19).
    UnallocatedAddress = 14, "unallocated-service-address";
    /// The packet was routed into the tunnel, and its destination is in the range of no other node.
    NoTunnel = 15, "no-tunnel";
    /// The policies of the pod that it is for let no such flow in.
    PolicyIngress = 16, "policy-ingress";
    /// The policies of the pod that sent it let no such flow out.
    PolicyEgress = 17, "policy-egress";
    /// It passed: policies in dry run would have dropped it as [`Self::PolicyIngress`].
    DryRunIngress = 18, "policy-ingress-dry-run";
    /// It passed: policies in dry run would have dropped it as [`Self::PolicyEgress`].
    DryRunEgress = 19, "policy-egress-dry-run";
    /// A packet is too long for the way that the node sends it on, and its sender cannot be told (a later fragment).
    TooBig = 20, "too-big";
    /// A pod's packet to the world, of a protocol that cannot be masqueraded: it has neither ports nor an identifier.
    Unmasqueradable = 21, "not-masqueradable";
    /// A pod sends from an address that is not its own.
    SpoofedSource = 22, "spoofed-source";
    /// Somebody who is no node of the cluster relays a packet.
    StrangeRelay = 23, "relayed-by-stranger";
    /// A packet was relayed that is of no flow and for no service here.
    AstrayRelay = 24, "relayed-astray";
    /// A packet that is to be relayed could not be put into the tunnel.
    RelayFailed = 25, "relay-failed";
}

/// How many rows the `drops` map has: room to add reasons without a new map.
pub const DROP_ROWS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_dense_unique_and_fit_the_map() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index, "{}", reason.as_str());
            assert_eq!(DropReason::from_number(*reason as u32), *reason);
        }
        assert!(DropReason::ALL.len() <= DROP_ROWS);
    }
}
