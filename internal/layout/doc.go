// Package layout holds no code: its test keeps the house in order. It fails when
// an import runs upwards, when the planner touches the world, when a package has
// no doc comment, or when a file has grown too long to read in a sitting.
package layout
