//! The annotations of a Service that say how new connections are spread.
//!
//! `ferroflow.dev/lb-algorithm` is `random`, `maglev`, `weighted` or `least-connection`. `ferroflow.dev/weights` gives
//! weights from 0 to 100 to addresses, ranges, nodes and zones, and implies `weighted`:
//!
//! ```text
//! ferroflow.dev/weights: "node/big-1=4, zone/eu-1a=2, 10.244.3.7=0"
//! ```
//!
//! What says more goes first: an address before a range, that before a node, that before a zone; what is not named has
//! 1. An endpoint with 0 gets new connections only where all have 0.

use std::net::IpAddr;

use ferroflow_common::addr::Addr;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::convert::prefix;
use super::fault::{Fault, Invalid};
use crate::model::weight::{Label, Target, Weights};
use crate::model::{Algorithm, Family, Prefix};

pub(super) const ALGORITHM: &str = "ferroflow.dev/lb-algorithm";
pub(super) const WEIGHTS: &str = "ferroflow.dev/weights";

/// What a Service says of how it is spread.
pub(super) struct Spread {
    pub(super) algorithm: Option<Algorithm>,
    pub(super) weights: Weights,
}

/// # Errors
/// The annotation that makes no sense.
pub(super) fn spread(metadata: &ObjectMeta) -> Result<Spread, Invalid> {
    let text = |key: &str| {
        let text = metadata.annotations.as_ref().and_then(|annotations| annotations.get(key));
        text.map(|text| text.trim()).filter(|text| !text.is_empty())
    };
    let at = |key: &str| format!("metadata.annotations[{key}]");
    let algorithm = text(ALGORITHM).map(algorithm).transpose().map_err(|fault| fault.at(at(ALGORITHM)))?;
    let Some(listed) = text(WEIGHTS) else { return Ok(Spread { algorithm, weights: Weights::default() }) };
    match algorithm {
        None | Some(Algorithm::Weighted | Algorithm::Maglev) => {}
        Some(Algorithm::Random | Algorithm::LeastConnection) => {
            let other = text(ALGORITHM).unwrap_or_default().to_owned();
            let path = "metadata.annotations[ferroflow.dev/lb-algorithm]";
            return Err(Fault::Contradicts { text: listed.to_owned(), other, path }.at(at(WEIGHTS)));
        }
    }
    let weights = listed.split(',').map(|text| weight(text.trim()));
    let weights = weights.collect::<Result<Vec<_>, _>>().map_err(|fault| fault.at(at(WEIGHTS)))?;
    Ok(Spread { algorithm: algorithm.or(Some(Algorithm::Weighted)), weights: Weights::new(weights) })
}

fn algorithm(text: &str) -> Result<Algorithm, Fault> {
    match text {
        "random" => Ok(Algorithm::Random),
        "maglev" => Ok(Algorithm::Maglev),
        "weighted" => Ok(Algorithm::Weighted),
        "least-connection" => Ok(Algorithm::LeastConnection),
        _ => {
            let values = "random, maglev, weighted or least-connection";
            Err(Fault::NotOneOf { text: text.into(), values })
        }
    }
}

fn weight(text: &str) -> Result<(Target, u8), Fault> {
    let bad = || Fault::NotAWeight { text: text.into(), most: Weights::MOST };
    let (target, number) = text.split_once('=').ok_or_else(bad)?;
    let number = number.trim().parse::<u8>().ok().filter(|it| *it <= Weights::MOST).ok_or_else(bad)?;
    let target = match target.trim().split_once('/') {
        Some(("node", name)) if !name.is_empty() => Target::Node(Label::of(name)),
        Some(("zone", name)) if !name.is_empty() => Target::Zone(Label::of(name)),
        Some(_) => Target::Range(prefix(target.trim()).map_err(|_not_a_range| bad())?),
        None => Target::Range(one(target.trim()).ok_or_else(bad)?),
    };
    Ok((target, number))
}

/// The range of one address.
fn one(text: &str) -> Option<Prefix> {
    let addr = Addr::from(text.parse::<IpAddr>().ok()?);
    Prefix::new(addr, if Family::of(&addr) == Family::V4 { 32 } else { 128 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(annotations: &[(&str, &str)]) -> Result<Spread, String> {
        let annotations = annotations.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned()));
        let metadata = ObjectMeta { annotations: Some(annotations.collect()), ..ObjectMeta::default() };
        spread(&metadata).map_err(|error| error.to_string())
    }

    #[test]
    fn algorithms_and_weights_are_read() {
        for (text, algorithm) in [
            ("random", Algorithm::Random),
            (" maglev ", Algorithm::Maglev),
            ("weighted", Algorithm::Weighted),
            ("least-connection", Algorithm::LeastConnection),
        ] {
            assert_eq!(said(&[(ALGORITHM, text)]).ok().unwrap().algorithm, Some(algorithm));
        }
        let listed = "node/big-1=4, zone/eu-1a = 2,10.244.3.7=0,10.244.4.0/24=100, fd00::7=9";
        for more in [&[][..], &[(ALGORITHM, "weighted")]] {
            let spread = said(&[&[(WEIGHTS, listed)], more].concat()).ok().unwrap();
            assert_eq!(spread.algorithm, Some(Algorithm::Weighted));
            let of = |addr: &str, node, zone| {
                let addr = Addr::from(addr.parse::<IpAddr>().unwrap());
                spread.weights.of(&addr, Label::of(node), Label::of(zone))
            };
            assert_eq!(of("10.244.3.8", "big-1", "eu-1a"), 4);
            assert_eq!(of("10.244.3.8", "", "eu-1a"), 2);
            assert_eq!(
                (of("10.244.3.7", "", ""), of("10.244.4.7", "", ""), of("fd00::7", "", "")),
                (0, 100, 9)
            );
        }
        let maglev = said(&[(WEIGHTS, listed), (ALGORITHM, "maglev")]).ok().unwrap();
        assert_eq!(maglev.algorithm, Some(Algorithm::Maglev));
    }

    #[test]
    fn bad_annotations_name_the_way_out() {
        for weight in
            ["big=3", "node/=3", "node/a", "node/a=101", "10.0.0.1/8=3", "zone/a=x", "a=1,,b=2", "-1"]
        {
            let message = said(&[(WEIGHTS, weight)]).err().unwrap();
            let (field, rest) = message.split_once(": ").unwrap();
            assert_eq!(field, "metadata.annotations[ferroflow.dev/weights]");
            assert!(rest.ends_with("is not a weight: write it like node/NAME=3, zone/NAME=2, 10.244.1.5=0 or 10.244.1.0/24=5, from 0 to 100"), "{message}");
        }
        for algorithm in ["random", "least-connection"] {
            let message = said(&[(WEIGHTS, "node/a=1"), (ALGORITHM, algorithm)]).err().unwrap();
            assert_eq!(
                message,
                format!(
                    "metadata.annotations[ferroflow.dev/weights]: `node/a=1` contradicts `{algorithm}` in \
                     metadata.annotations[ferroflow.dev/lb-algorithm]: leave one of them out"
                )
            );
        }
        assert_eq!(
            said(&[(ALGORITHM, "round-robin")]).err().unwrap(),
            "metadata.annotations[ferroflow.dev/lb-algorithm]: `round-robin` is none of its values: use random, \
             maglev, weighted or least-connection"
        );
    }
}
