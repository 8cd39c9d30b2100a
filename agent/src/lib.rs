//! The agent: from the objects of a cluster to the tables of the datapath.
//!
//! ```text
//!   watch/ ──Change──▶ model/ ──Touched──▶ plan/ ──Desired──▶ reconcile/ ──rows──▶ maps/
//!   directory of        World:               pure: one key in,   restore, diff,        frontends, slots,
//!   YAML, or the        what is known        its rows out        order, retry          backends, services,
//!   Kubernetes API      of the cluster                                                 endpoints
//! ```
//!
//! `cni/` attaches pods to the network: it has addresses from `ipam/` and links from `net/`, and answers when their rows
//! are in the tables. `net/` also reports the host's own addresses and routes, which are Changes too; `datapath/` loads
//! the programs and attaches them where the plan says; `daemon` joins the stages in one loop; `health/` answers load
//! balancers; `observe/` shows metrics; `kube_proxy/` finds and removes what the proxy before left; `events/` takes what users should know of their
//! objects, which `watch/kube/` posts; `cli/` reads the maps without any of these; `node/`
//! readies a machine, examines it, and leaves it as it was.
//!
//! A folder is a stage. What a stage may import (`cargo xtask layers` enforces it):
//!
//! | module | may use | must not use |
//! | --- | --- | --- |
//! | `model` | `common` | Kubernetes types, aya, tokio, clocks |
//! | `watch` | `model`, Kubernetes types | `plan`, `maps` |
//! | `plan` | `model`, `common` | any I/O, aya, Kubernetes types, clocks, randomness |
//! | `reconcile` | `model`, `plan`, `maps` | `watch`, Kubernetes types, aya |
//! | `maps` | `common`, aya in `kernel` only | `model`, `plan` |
//! | `health` | `model` | `maps`, `reconcile`, aya |
//! | `observe` | `model`, `health` | `reconcile`, `datapath`, `net` |
//! | `cni`, `ipam`, `net` | `model` | `maps`, aya |
//! | `node` | `config`, `datapath` | `model`, `plan`, `maps`, Kubernetes types |

pub mod cli;
pub mod clock;
pub mod cni;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod durable;
pub mod events;
pub mod gc;
pub mod health;
pub mod heap;
pub mod ipam;
pub mod kube_proxy;
pub mod lock;
pub mod maps;
pub mod model;
pub mod net;
pub mod node;
pub mod observe;
mod patrol;
pub mod plan;
pub mod reconcile;
mod scrape;
pub mod stale;
pub mod watch;

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn every_stage_in_the_drawing_is_a_folder() {
        let drawing = include_str!("lib.rs").lines().take_while(|line| line.starts_with("//!"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut found = 0;
        for word in drawing.flat_map(str::split_whitespace).filter(|word| word.ends_with('/')) {
            assert!(source.join(word).is_dir(), "{word} is drawn and is no folder of src");
            found += 1;
        }
        assert!(found >= 5, "the drawing names {found} folders");
    }
}
