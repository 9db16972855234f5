// Package cli is the command `tandem` as users type it: a face over the API that
// knows nothing below it. New returns the command tree; Run executes it and turns
// errors into messages and exit codes (0 done, 1 failed, 2 wrong usage, 3 "the plan
// has changes", where that was asked).
//
// Commands that list or inspect take --format json: an array of objects, or one
// object, with the API's field names in snake_case. Long work shows progress on
// standard error, so that standard output can be piped.
package cli
