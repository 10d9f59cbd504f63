//! What the fuzzer starts from, and what it has found, tried against the same rules.

#[cfg(test)]
#[path = "../fuzz/fuzz_targets/oracle.rs"]
mod oracle;

#[cfg(test)]
mod tests {
    use super::oracle;

    #[test]
    fn every_input_of_the_corpus_keeps_the_rules() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/decoder");
        let files: Vec<_> = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(files.len() > 50, "{} inputs", files.len());
        for file in files {
            println!("{}", file.display());
            oracle::check(&std::fs::read(file).unwrap());
        }
    }
}
