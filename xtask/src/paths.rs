//! Reads the paths out of Rust text. It is no parser: it knows comments, literals, `use` trees and `a::b`.

/// `agent/src/watch/kube.rs` is `crate::watch::kube`.
pub(crate) fn module(file: &str) -> Vec<&str> {
    let inner = file.split_once("/src/").map_or("", |(_, inner)| inner).trim_end_matches(".rs");
    let names = inner.split('/').filter(|name| !["", "lib", "main", "mod"].contains(name));
    std::iter::once("crate").chain(names).collect()
}

/// The code alone: comments, strings and characters become blanks, lines stay where they are.
pub(crate) fn blank(text: &str) -> String {
    let mut code: Vec<char> = text.chars().collect();
    let mut at = 0;
    while at < code.len() {
        let end = code.len().min(at + not_code(&code, at));
        code[at..end].iter_mut().filter(|c| **c != '\n').for_each(|c| *c = ' ');
        at = end.max(at + 1);
    }
    code.into_iter().collect()
}

/// How many characters of a comment, string or character start here; 0 for code.
fn not_code(code: &[char], at: usize) -> usize {
    let rest = &code[at..];
    let in_word = at > 0 && is_word(code[at - 1]);
    let until = |end: &[char], from: usize| {
        let tail = rest.get(from..).unwrap_or_default();
        tail.windows(end.len())
            .position(|window| window == end)
            .map_or(rest.len(), |at| from + at + end.len())
    };
    match rest {
        ['/', '/', ..] => rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
        ['/', '*', ..] => until(&['*', '/'], 2),
        ['\'', '\\', ..] => until(&['\''], 3),
        ['\'', _, '\'', ..] => 3,
        ['"', ..] => {
            let mut end = 1;
            while end < rest.len() && rest[end] != '"' {
                end += if rest[end] == '\\' { 2 } else { 1 };
            }
            end + 1
        }
        ['r', tail @ ..] | ['b' | 'c', 'r', tail @ ..] if !in_word => {
            let hashes = tail.iter().take_while(|c| **c == '#').count();
            if tail.get(hashes) != Some(&'"') {
                return 0;
            }
            let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
            until(&end, rest.len() - tail.len() + hashes + 1)
        }
        _ => 0,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Words, `::`, and single signs, each with its line.
pub(crate) fn tokens(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (line, text) in code.lines().enumerate() {
        let mut rest = text.trim_start();
        while let Some(first) = rest.chars().next() {
            let word = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            let length = if rest.starts_with("::") { 2 } else { word.max(first.len_utf8()) };
            found.push((line + 1, &rest[..length]));
            rest = rest[length..].trim_start();
        }
    }
    found
}

/// Every path in the code and every leaf of a `use`, as seen from the crate's root.
pub(crate) fn paths(tokens: &[(usize, &str)], module: &[&str]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let start = at;
        at += 1;
        if tokens[start].1 == "use" {
            leaves(tokens, &mut at, Vec::new(), &mut found);
        } else if tokens[start].1.starts_with(is_word) {
            while at + 1 < tokens.len() && tokens[at].1 == "::" && tokens[at + 1].1.starts_with(is_word) {
                at += 2;
            }
            if at > start + 1 {
                let words = tokens[start..at].iter().step_by(2).map(|token| token.1).collect();
                found.push((tokens[start].0, words));
            }
        }
    }
    found.into_iter().map(|(line, path)| (line, absolute(path, module))).collect()
}

/// One branch of the tree after `use`.
fn leaves<'a>(
    tokens: &[(usize, &'a str)],
    at: &mut usize,
    mut path: Vec<&'a str>,
    found: &mut Vec<(usize, Vec<&'a str>)>,
) {
    while let Some((line, token)) = tokens.get(*at) {
        match *token {
            "{" => {
                while matches!(tokens.get(*at), Some((_, "{" | ","))) {
                    *at += 1;
                    leaves(tokens, at, path.clone(), found);
                }
                *at += 1;
                return;
            }
            "as" => *at += 1,
            "::" | "*" => {}
            word if word.starts_with(is_word) => path.push(word),
            _ => {
                found.push((*line, path));
                return;
            }
        }
        *at += 1;
    }
}

fn absolute(path: Vec<&str>, module: &[&str]) -> String {
    let up: Vec<_> = path.iter().take_while(|word| ["self", "super"].contains(word)).collect();
    let supers = up.iter().filter(|word| ***word == "super").count();
    let start = if up.is_empty() { &[] } else { &module[..module.len().saturating_sub(supers)] };
    start.iter().chain(&path[up.len()..]).copied().collect::<Vec<_>>().join("::")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(file: &str, text: &str) -> Vec<(usize, String)> {
        paths(&tokens(&blank(text)), &module(file))
    }

    fn at(line: usize, path: &str) -> (usize, String) {
        (line, path.to_owned())
    }

    #[test]
    fn use_trees_are_spread_out() {
        let text = "use std::{fmt,\n    net::{IpAddr as A, *},\n};\nuse clap;";
        let all = [at(1, "std::fmt"), at(2, "std::net::IpAddr"), at(2, "std::net"), at(4, "clap")];
        let read: Vec<_> =
            read("agent/src/lib.rs", text).into_iter().filter(|(_, path)| path != "std").collect();
        assert_eq!(read, all);
    }

    #[test]
    fn relative_paths_start_at_the_root() {
        for (file, text, path) in [
            ("agent/src/watch/mod.rs", "use super::maps::A;", "crate::maps::A"),
            ("agent/src/watch/kube.rs", "fn f(a: super::super::maps::A) {}", "crate::maps::A"),
            ("agent/src/watch/kube.rs", "use self::maps::A;", "crate::watch::kube::maps::A"),
            ("agent/src/lib.rs", "crate::maps::A::new()", "crate::maps::A::new"),
        ] {
            assert_eq!(read(file, text), [at(1, path)]);
        }
    }

    #[test]
    fn literals_and_comments_are_not_code() {
        for text in [
            "// a::b",
            "/* a::b\n*/",
            "/// a::b",
            "\"a::b\"",
            "\"\\\"a::b\"",
            "r\"a::b\\\"",
            "br##\"a::b\"#\"##",
            "'\"'; // a::b '\"'",
        ] {
            assert!(read("agent/src/lib.rs", text).is_empty(), "{text}");
        }
        for text in
            ["'\"' a::b '\"'", "'\\'' a::b", "f<'a>(a::b)", "\"\\\\\" a::b", "r#\"\"\"# a::b", "for\"\" a::b"]
        {
            assert_eq!(read("agent/src/lib.rs", text), [at(1, "a::b")], "{text}");
        }
    }
}
