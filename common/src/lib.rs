//! What the BPF programs and the agent share: `no_std`, no unsafe, no aya.
//!
//! A thing belongs here only if both sides execute it (checksum, tuple hash, TCP state) or both sides lay it out
//! (the map ABI in [`abi`], [`verdict::DropReason`]). Everything else has a home on one side.
//!
//! The maps, all pinned as `<bpffs>/maps/<name>`:
//!
//! | map | type | key -> value | written by | read by |
//! | --- | --- | --- | --- | --- |
//! | `frontends` | hash | [`abi::lb::FrontendKey`] -> [`abi::lb::Frontend`] | agent | programs, CLI |
//! | `slots` | array, mmap | slot -> [`abi::lb::Slot`] | agent | programs, CLI |
//! | `backends` | array, mmap | index -> [`abi::lb::Backend`] | agent | programs, CLI |
//! | `connections` | array, mmap | backend index -> [`abi::lb::Connections`] | programs, agent | programs |
//! | `source_ranges` | LPM trie | [`abi::lb::SourceRangeKey`] -> [`abi::lb::SourceRange`] | agent | programs |
//! | `affinity` | LRU hash | [`abi::lb::AffinityKey`] -> [`abi::lb::Affinity`] | programs | programs |
//! | `services` | hash | service id -> [`abi::lb::ServiceName`] | agent | agent (restore), CLI |
//! | `endpoints` | hash | [`addr::Addr`] -> [`abi::endpoint::Endpoint`] | agent | programs, CLI |
//! | `ipcache` | hash | [`addr::Addr`] -> [`abi::policy::Class`] | agent | programs, CLI |
//! | `ipcache_ranges` | LPM trie | [`abi::policy::RangeKey`] -> [`abi::policy::Class`] | agent | programs, CLI |
//! | `policy` | hash | [`abi::policy::PolicyKey`] -> [`abi::policy::Rules`] | agent | programs, CLI |
//! | `port_ranges` | array, mmap | row -> [`abi::policy::PortRange`] | agent | programs, CLI |
//! | `policy_sets`, `peer_classes` | hash | number -> [`abi::policy::Meaning`] | agent | agent (restore), CLI |
//! | `tunnels` | LPM trie | [`abi::policy::RangeKey`] -> [`abi::tunnel::Tunnel`] | agent | programs |
//! | `node_tunnels` | hash | [`addr::Addr`] of a node -> [`abi::tunnel::Tunnel`] | agent | programs |
//! | `relay_nodes` | hash | [`abi::relay::NodeNumber`] -> [`addr::Addr`] of the node | agent | programs |
//! | `relay_peers` | hash | [`addr::Addr`] -> [`abi::relay::NodeNumber`] of the node that has it | agent | programs |
//! | `node_addresses` | hash | [`addr::Addr`] -> [`abi::node::NodeAddress`] | agent | programs |
//! | `settings` | array, mmap | 0 -> [`abi::node::Settings`] | agent | programs |
//! | `masquerade` | array, mmap | 0 -> [`abi::node::Masquerade`] | agent | programs |
//! | `exit_addresses` | hash | interface -> [`abi::node::Masquerade`] | agent | programs |
//! | `unmasqueraded` | LPM trie | [`abi::policy::RangeKey`] -> [`abi::node::Unmasqueraded`] | agent | programs |
//! | `conntrack_v4`, `conntrack_v6` | LRU hash | [`abi::conntrack::Tuple`] -> [`abi::conntrack::Entry`] | programs | programs, CLI; the agent deletes what expired |
//! | `datagrams` | LRU hash | [`abi::fragment::DatagramKey`] -> [`abi::fragment::Datagram`] | programs | programs |
//! | `held_fragments` | LRU hash | [`abi::fragment::DatagramKey`] -> [`abi::fragment::HeldFragment`] | programs | programs |
//! | `noted_datagram` | per-CPU array | 0 -> [`abi::fragment::DatagramKey`] of the packet under way | programs | programs |
//! | `held_buffer` | per-CPU array | 0 -> [`abi::fragment::HeldFragment`] on its way into `held_fragments` | programs | programs |
//! | `sockets` | socket storage | stream socket -> [`abi::socket::Translation`] | programs | programs |
//! | `datagram_sockets` | socket storage | datagram socket -> [`abi::socket::Translations`] | programs | programs |
//! | `connected_sockets` | hash | cookie -> [`abi::socket::Translation`] of a connected datagram socket of the host | programs | agent, which deletes what is closed |
//! | `drops` | per-CPU array | [`verdict::DropReason`] -> packets | programs | agent (metrics), CLI |
//! | `agent` | array | 0 -> [`abi::state::AgentState`] | agent | CLI |
#![no_std]
#![forbid(unsafe_code)]

pub mod abi;
pub mod addr;
pub mod crc32c;
pub mod csum;
pub mod family;
pub mod hash;
pub mod tcp;
pub mod verdict;
